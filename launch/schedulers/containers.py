"""What the schedulers that run images share: which requests they refuse, and the code as a layer of the image."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath

from docker.errors import APIError, DockerException
from torchx.specs import BindMount, CfgVal, Role, VolumeMount
from torchx.workspace.docker_workspace import DockerWorkspaceMixin

from launch.component import mounts_of
from launch.request import Request


@contextmanager
def docker_answers() -> Iterator[None]:
    """Say in one line that Docker does not answer, or what it refuses.

    Raises:
        ConnectionError: for any error of Docker's within the block.
    """
    try:
        yield
    except APIError as error:
        raise ConnectionError(f"Docker refuses: {' '.join(str(error).split())}") from None
    except DockerException as error:
        raise ConnectionError(
            f"Docker does not answer ({' '.join(str(error).split())}): start it on this machine, where it adds the "
            "code to the image"
        ) from None


class CodeInImage(DockerWorkspaceMixin):
    """Adds the code to the image by the Docker engine of the machine that submits."""

    def build_workspace_and_update_role(self, role: Role, workspace: str, cfg: Mapping[str, CfgVal]) -> None:
        """TorchX's own step, with one clear error where the Docker engine does not answer."""
        with docker_answers():
            super().build_workspace_and_update_role(role, workspace, cfg)


def check_container(request: Request) -> None:
    """Refuse a request without an image, or whose run directory would end with the container.

    Raises:
        ValueError: it is one.
    """
    if not request.image or request.run_dir is None:
        raise ValueError(f"scheduler {request.scheduler} needs --image and --run-dir, a path inside the container")
    if not request.run_dir.is_absolute():
        raise ValueError(f"--run-dir {request.run_dir} is relative: give an absolute path inside the container")
    _check_run_dir(PurePosixPath(request.run_dir), mounts_of(request))


def _check_run_dir(run_dir: PurePosixPath, mounts: list[BindMount | VolumeMount]) -> None:
    """Make sure that what a run writes outlives its containers.

    Raises:
        ValueError: the run directory lies under no mount, or under one that is read-only.
    """
    above = [mount for mount in mounts if run_dir.is_relative_to(mount.dst_path)]
    if not above:
        raise ValueError(f"--run-dir {run_dir} lies under no --mount: what the run writes would end with its container")
    if max(above, key=lambda mount: len(mount.dst_path)).read_only:
        raise ValueError(f"--run-dir {run_dir} lies under a read-only --mount: a run must write there")
