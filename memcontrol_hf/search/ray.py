"""Workers that Ray places on its cluster; each asks the one study for trials, as workers started by hand do.

transformers' own Ray backend knows one objective and no queued masks, and loses the study; hence this one. Ray is an
optional dependency, so it is imported where it is used.
"""

import importlib.util
import io
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Any

import optuna
from transformers.trainer_utils import BestRun

from ..error_lines import first_line
from ..tracking import end_tracking
from .front import NoRunError, complete_trials
from .loop import run_search
from .protocol import SearchableTrainer
from .sampler import SeededSampler
from .storage import open_storage, public_address, storage_address
from .study import SharedStudy
from .worker import this_worker

# torchrun tells these to the processes that it starts. Ray's workers inherit them, but torchrun did not start them.
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_package = logging.getLogger("memcontrol_hf")


def check_ray(num_workers: int) -> None:
    """Raise `ValueError` for less than one worker, and when Ray is not installed."""
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, but is {num_workers}")
    if importlib.util.find_spec("ray") is None:
        raise ValueError("the backend 'ray' needs Ray: pip install 'memcontrol_hf[ray]'")


def run_search_on_ray(
    trainer: SearchableTrainer,
    *search: Any,
    num_workers: int = 2,
    resources_per_trial: Mapping[str, float] | None = None,
    **options: Any,
) -> BestRun | list[BestRun]:
    """Run [`~memcontrol_hf.search.run_search`] by workers on a Ray cluster.

    The cluster is the one that this process is connected to or finds (`RAY_ADDRESS`), or else one that is started on
    this machine for the search. A worker that dies is replaced, and its trial is repeated.

    Args:
        num_workers (`int`):
            Number of trials that run at once, where the cluster has the resources. Each worker builds the trainer
            anew.
        resources_per_trial (`dict[str, float]`, *optional*):
            Resources that Ray reserves for a worker: `{"cpu": 1, "gpu": 1}`, and resources with names of your own. By
            default one CPU, and one GPU if this process sees any.
        *search, **options:
            Arguments of `run_search`. All nodes must reach the `storage`.

    Raises:
        ValueError: before the first trial, as `run_search`; and for `num_workers` below 1, several processes, a
            sampler object for several workers, arguments that cannot be pickled, resources that Ray does not have, and
            when Ray is not installed.
        RuntimeError: as `run_search`; and when workers die again and again without a trial being finished.
    """
    check_ray(num_workers)
    if trainer.args.world_size > 1:
        raise ValueError(f"Ray starts the workers: launch one process, not {trainer.args.world_size}")
    if num_workers > 1 and not isinstance(options.get("sampler", "tpe"), (str, SeededSampler)):
        raise ValueError("a sampler of your own would draw the same in each worker: use a name or a SeededSampler")
    resources = resources_per_trial or {"cpu": 1, "gpu": min(1, trainer.args.n_gpu)}
    resources = {name.upper() if name.lower() in ("cpu", "gpu") else name: n for name, n in resources.items()}
    storage = storage_address(options.get("storage"), trainer.args.output_dir)
    storage = storage if "://" in storage else str(Path(storage).resolve())

    def delegate(shared: SharedStudy) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        task = _pickled(trainer, search, {**options, "storage": storage, "study_name": shared.study.study_name})
        with _cluster(resources):
            _run_workers(shared, task, num_workers, resources)

    return run_search(trainer, *search, delegate=delegate, **options)


def _pickled(trainer: SearchableTrainer, search: tuple[Any, ...], options: Mapping[str, Any]) -> bytes:
    """The task of a worker: to build the trainer anew, and to search with it."""
    from ray.cloudpickle import CloudPickler

    class Pickler(CloudPickler):
        def persistent_id(self, found: object) -> None:
            if found is trainer:  # a worker would have another one beside its own
                raise ValueError("it holds the trainer")

    task = io.BytesIO()
    try:
        Pickler(task).dump((type(trainer), trainer.recipe(), search, options))
        return task.getvalue()
    except Exception as error:
        raise ValueError(
            f"the search cannot be sent to Ray's workers ({error}): hp_space, compute_objective, hp_name and "
            "callbacks must not hold the trainer, nor anything else that cannot be pickled"
        ) from error


@contextmanager
def _cluster(resources: Mapping[str, float]) -> Iterator[None]:
    """Connect to a Ray cluster, or start one; a cluster that was started here is ended here.

    Args:
        resources (`dict[str, float]`): resources of a worker, which a cluster on this machine must have.
    """
    import ray

    started_here = not ray.is_initialized()
    may_grow = ray.is_initialized() or "RAY_ADDRESS" in os.environ
    if started_here:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, SystemExit) as error:  # Ray 2.60 exits where nobody answers at RAY_ADDRESS
            raise RuntimeError(
                f"no Ray cluster answers ({error}): start it, or unset RAY_ADDRESS; `ray stop` clears what a "
                "crashed cluster left"
            ) from None
    try:
        available = ray.cluster_resources()
        if not may_grow and any(available.get(name, 0) < n for name, n in resources.items()):
            raise ValueError(f"a worker needs {resources}, but Ray has {available} on this machine")
        yield
    finally:
        if started_here:
            ray.shutdown()


def _run_workers(shared: SharedStudy, task: bytes, count: int, resources: Mapping[str, float]) -> None:
    """Start workers, replace those that die, and wait until all have ended."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    workers = _Workers(shared, task, resources)
    died = finished = 0
    try:
        for _ in range(count):
            workers.start()
        while workers.searches:
            (ended,), _ = ray.wait([*workers.searches])
            workers.end(ended)
            try:
                ray.get(ended)
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                reason = first_line(error)
                before, finished = finished, len(complete_trials(shared.study))
                died = died + 1 if finished == before else 1
                if died > count + 2:  # all at once, with their machine, and some more
                    raise RuntimeError(f"{died} workers died and no trial was finished: {reason}") from None
                _package.warning(f"a worker died and is replaced: {reason}")
                workers.start()
            else:
                workers.end_those_that_wait()
    finally:
        workers.close()


class _Workers:
    """The workers of a search on Ray's cluster, whose log lines are logged here.

    `searches` holds, by the future end of each worker's search, the worker and its future identity.
    """

    def __init__(self, shared: SharedStudy, task: bytes, resources: Mapping[str, float]) -> None:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        needs = dict(resources)
        cpus, gpus = needs.pop("CPU", 1), needs.pop("GPU", 0)
        self._kind = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus, resources=needs)
        self._shared, self._task = shared, ray.put(task)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._log = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._listener = _Listener(self._log)
        self._listener.start()
        self.searches: dict[Any, tuple[Any, Any]] = {}

    def start(self) -> None:
        """Start a worker, once the cluster has room for it."""
        worker = self._kind.remote()
        identity = worker.identity.remote()
        self.searches[worker.search.remote(self._task, self._log, _package.getEffectiveLevel())] = worker, identity

    def end(self, search: Any) -> None:
        """End a worker; a trial that it leaves behind is queued again."""
        import ray
        from ray.exceptions import RayError

        worker, identity = self.searches.pop(search)
        ray.kill(worker)
        with suppress(RayError):  # it died before it told its identity, or has not begun
            self._shared.queue_again_what_died(ray.get(identity, timeout=1))

    def end_those_that_wait(self) -> None:
        """End workers that have not begun: the study is done, so they are not needed."""
        import ray

        for search in [s for s, (_, identity) in self.searches.items() if not ray.wait([identity], timeout=0)[0]]:
            self.end(search)

    def close(self) -> None:
        """End all workers, and their log."""
        for search in [*self.searches]:
            self.end(search)
        self._listener.stop()
        self._log.shutdown(force=True)


class _Worker:
    """A process of Ray's that works on the study until the study is done."""

    def identity(self) -> list[Any]:
        return this_worker()

    def search(self, task: bytes, log: Any, level: int) -> None:
        import ray

        for name in _OF_LAUNCHER:
            os.environ.pop(name, None)
        _package.setLevel(level)
        _package.addHandler(QueueHandler(log))
        kind, recipe, search, options = ray.cloudpickle.loads(task)
        make_args, args = recipe.pop("args")
        try:
            optuna.load_study(study_name=options["study_name"], storage=open_storage(options["storage"]))
        except (KeyError, OSError):
            raise ValueError(
                f"the study in {public_address(options['storage'])} is not seen from {socket.gethostname()}: "
                "use a folder that all nodes share, a database or grpc://host:port"
            ) from None
        try:
            with suppress(NoRunError):  # another worker may have one
                run_search(kind(args=make_args(**args), **recipe), *search, **options)
        finally:
            end_tracking()


class _Listener(QueueListener):
    """Logs what the workers log as if it were logged here."""

    def handle(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)
