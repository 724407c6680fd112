"""Docker on this machine: TorchX's scheduler, a container a node."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torchx.schedulers.api import AppDryRunInfo
from torchx.schedulers.docker_scheduler import DockerJob, DockerScheduler
from torchx.specs import CfgVal

from launch import records
from launch.component import ROLE
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers.containers import CodeInImage, check_container, docker_answers
from launch.schedulers.protocol import JobStatus, ListedJob, options_from, parser_of, resolve_options
from trainer.command_line import Finding


class Docker(CodeInImage, DockerScheduler):
    """Containers of one Docker engine, on a network of their own."""

    needs_image: ClassVar[bool] = True
    has_arrays: ClassVar[bool] = False
    without_effect: ClassVar[tuple[str, ...]] = ()

    def __init__(self, session_name: str) -> None:
        super().__init__(session_name)
        self.backend = "local_docker"

    def check(self, request: Request) -> dict[str, CfgVal]:
        """TorchX's options, an image, and a run directory that outlives the containers."""
        known = self.run_opts()
        options = options_from(request, parse=parser_of(known, "local_docker"))
        check_container(request)
        return resolve_options(known, options, "local_docker")

    def schedule(self, dryrun_info: AppDryRunInfo[DockerJob]) -> str:
        """Start the containers.

        Raises:
            ConnectionError: the engine does not answer.
        """
        with docker_answers():
            return str(super().schedule(dryrun_info))

    def record_of(self, app_id: str) -> JobRecord | None:
        """None: nothing leads from a container to the record of another checkout."""
        return None

    def status(self, app_id: str, record: JobRecord | None) -> JobStatus | None:
        """What is known of a job, from its containers."""
        with docker_answers():
            described = self.describe(app_id)
        return None if described is None else JobStatus(state=described.state)

    def output(self, app_id: str, record: JobRecord | None, node: int) -> Iterator[str]:
        """The log of the node's container."""
        with docker_answers():
            try:
                yield from self.log_iter(app_id, ROLE, node)
            except RuntimeError as error:
                raise ValueError(str(error)) from None

    def cancel_job(self, app_id: str, record: JobRecord | None) -> None:
        """Stop the job's containers."""
        with docker_answers():
            self.cancel(app_id)

    def jobs(self) -> Sequence[ListedJob]:
        """All that TorchX started, with our record where there is one."""
        ours = {record.handle.rpartition("/")[2]: record for record in records.load()}
        with docker_answers():
            return [ListedJob(app_id=job.app_id, state=job.state, record=ours.get(job.app_id)) for job in self.list()]

    def doctor(self) -> Iterator[Finding]:
        """Whether the engine answers."""
        try:
            with docker_answers():
                version: dict[str, Any] = self._docker_client.version()
        except ConnectionError as error:
            yield Finding(ok=False, text=str(error))
            return
        yield Finding(ok=True, text=f"Docker {version.get('Version', '')} answers")
