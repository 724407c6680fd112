"""What every kind of label gives: targets, outputs, loss, prediction and metrics.

Shapes: C candidates, K outputs of the label.
"""

from torch import Tensor, nn

from pipelines.batches.batch import Labels


class LabelKind(nn.Module):
    """One label of candidates.  It has no parameters; what it knows of the data are buffers or plain numbers."""

    name: str
    """The action or the label column."""
    num_outputs: int
    """K, the outputs that the head gives for this label."""
    metrics: tuple[str, ...]
    """What `measure` returns, in the order of tables."""

    def targets(self, labels: Labels) -> Tensor:
        """[C] what became of each candidate; NaN where it is not known."""
        raise NotImplementedError

    def start(self) -> Tensor:
        """[K] outputs that say what is known without a look at the candidate: its base rate, its mean."""
        raise NotImplementedError

    def loss(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C] loss of each candidate; 0, with gradients of 0, where the target is not known."""
        raise NotImplementedError

    def predict(self, outputs_CK: Tensor) -> Tensor:
        """What the outputs mean in the label's own terms: a probability [C], a value [C], probabilities [C, K]."""
        raise NotImplementedError

    def evidence(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C, any width] float64: what `measure` has to know of each candidate.

        The last column is NaN where the target is not known, and nowhere else.
        """
        raise NotImplementedError

    def measure(self, evidence: Tensor, weights_C: Tensor, user_ids_C: Tensor) -> dict[str, float]:
        """The metrics of candidates with known targets, at least one; NaN where they leave one undefined."""
        raise NotImplementedError
