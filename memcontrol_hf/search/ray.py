"""Workers that Ray places on its cluster; each asks the one study for trials, as workers started by hand do.

transformers' own Ray backend knows one objective and no queued masks, and loses the study; hence this one.
"""

import importlib.util
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from transformers.trainer_utils import BestRun

from ..tracking import end_tracking
from .loop import (
    NoRunError,
    SeededSampler,
    complete_trials,
    open_storage,
    public_address,
    queue_again_what_died,
    run_search,
    this_worker,
)

if TYPE_CHECKING:
    from ..trainer import MemControlTrainer

# What torchrun tells the processes that it started: Ray's workers, which inherit it, are none of them.
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_package = logging.getLogger("memcontrol_hf")


def check_ray(num_workers: int) -> None:
    """Raise `ValueError` for less than one worker, and when Ray is not installed."""
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, but is {num_workers}")
    if importlib.util.find_spec("ray") is None:
        raise ValueError("the backend 'ray' needs Ray: pip install 'memcontrol_hf[ray]'")


def run_search_on_ray(
    trainer: "MemControlTrainer",
    *search: Any,
    num_workers: int = 2,
    resources_per_trial: Mapping[str, float] | None = None,
    **options: Any,
) -> BestRun | list[BestRun]:
    """[`~memcontrol_hf.search.run_search`] by workers on a Ray cluster.

    The cluster is the one that this process is connected to or finds (`RAY_ADDRESS`), or else one that is started on
    this machine for the search. A worker that dies is replaced, and its trial repeated.

    Args:
        num_workers (`int`):
            Trials that run at once, where the cluster has the resources. Each worker builds the trainer anew.
        resources_per_trial (`dict[str, float]`, *optional*):
            What Ray reserves for a worker: `{"cpu": 1, "gpu": 1}`, and resources of your own names. By default one
            CPU, and one GPU if this process sees any.
        *search, **options:
            Of `run_search`. All nodes must reach the `storage`.

    Raises:
        ValueError: before the first trial, as `run_search`; and for `num_workers` below 1, several processes, a
            sampler of your own for several workers, what cannot be pickled, and resources that Ray does not have; and
            without Ray.
        RuntimeError: as `run_search`; and when workers die again and again without a trial being finished.
    """
    check_ray(num_workers)
    if trainer.args.world_size > 1:
        raise ValueError(f"Ray starts the workers: launch one process, not {trainer.args.world_size}")
    if num_workers > 1 and not isinstance(options.get("sampler", "tpe"), (str, SeededSampler)):
        raise ValueError("a sampler of your own would draw the same in each worker: use a name or a SeededSampler")
    resources = resources_per_trial or {"cpu": 1, "gpu": min(1, trainer.args.n_gpu)}
    resources = {name.upper() if name.lower() in ("cpu", "gpu") else name: n for name, n in resources.items()}
    storage = options.get("storage") or str(Path(trainer.args.output_dir) / "study.journal")
    storage = storage if "://" in storage else str(Path(storage).resolve())

    def work(study: optuna.Study) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        try:
            task = ray.cloudpickle.dumps((type(trainer), trainer.recipe(), search, {**options, "storage": storage}))
        except Exception as error:
            raise ValueError(
                f"the search cannot be sent to Ray's workers ({error}): hp_space, compute_objective, hp_name and "
                "callbacks must not hold the trainer, nor anything else that cannot be pickled"
            ) from error
        ours, may_grow = not ray.is_initialized(), ray.is_initialized() or "RAY_ADDRESS" in os.environ
        if ours:
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, SystemExit) as error:  # Ray 2.60 exits where nobody answers at RAY_ADDRESS
                raise RuntimeError(
                    f"no Ray cluster answers ({error}): start it, or unset RAY_ADDRESS; `ray stop` clears what a "
                    "crashed cluster left"
                ) from None
        try:
            there = ray.cluster_resources()
            if not may_grow and any(there.get(name, 0) < n for name, n in resources.items()):
                raise ValueError(f"a worker needs {resources}, but Ray has {there} on this machine")
            _have_done(study, ray.put(task), num_workers, resources, options.get("trial_timeout"))
        finally:
            if ours:
                ray.shutdown()

    return run_search(trainer, *search, delegate=work, **options)


def _have_done(study: optuna.Study, task: Any, count: int, resources: dict[str, float], timeout: float | None) -> None:
    """Start workers, replace those that die, and wait until all have ended."""
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    needs = dict(resources)
    kind = ray.remote(_Worker).options(num_cpus=needs.pop("CPU", 1), num_gpus=needs.pop("GPU", 0), resources=needs)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    listener = _Listener(log)
    listener.start()
    working: dict[Any, tuple[Any, Any]] = {}  # the end of its search -> worker, and who it is

    def start() -> None:
        worker = kind.remote()
        who = worker.who.remote()
        working[worker.search.remote(task, log, _package.getEffectiveLevel())] = worker, who

    def end(worker: Any, who: Any) -> None:
        ray.kill(worker)
        with suppress(RayError):  # it died before it said who it is, or has not begun
            queue_again_what_died(study, timeout, ray.get(who, timeout=1))

    died = finished = 0
    try:
        for _ in range(count):
            start()
        while working:
            (ended,), _ = ray.wait([*working])
            end(*working.pop(ended))
            try:
                ray.get(ended)
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                reason = str(error).strip().splitlines()[0]
                before, finished = finished, len(complete_trials(study))
                died = died + 1 if finished == before else 1
                if died > count + 2:  # all at once, with their machine, and some more
                    raise RuntimeError(f"{died} workers died and no trial was finished: {reason}") from None
                _package.warning(f"a worker died and is replaced: {reason}")
                start()
            else:  # the study is done: those that have not begun are not needed
                for waiting in [search for search, (_, who) in working.items() if not ray.wait([who], timeout=0)[0]]:
                    end(*working.pop(waiting))
    finally:
        for worker in working.values():
            end(*worker)
        listener.stop()
        log.shutdown(force=True)


class _Worker:
    """A process of Ray's that works on the study until it is done."""

    def who(self) -> list[Any]:
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
            optuna.load_study(
                study_name=options.get("study_name", "memcontrol"), storage=open_storage(options["storage"])
            )
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
    """What the workers log, as if it were logged here."""

    def handle(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)
