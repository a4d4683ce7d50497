"""Kill the whole of `memcontrol train` at moments of its life, and see what the same command makes of what is left.

    python tests/kill_moments.py --moments 80 --output docs/results/kill_moments.json

A moment is a file that is opened to be written, synced, renamed or deleted, a folder that is made, or a training step,
in the output folder or the cache; they are counted by Python's audit hooks. The process gets SIGKILL there. In every
second moment what it was writing last is torn first: half of a file that was not synced, or half of a record of the
journal. Then the same command runs to its end, and the adapter, the report and the card have to be those of a run that
nobody killed, byte for byte. It resumes: moments that the output file holds already are not repeated.
"""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ENDS = ("adapter_model.safetensors", "adapter_config.json", "memorization_report.json", "README.md")
"""What has to be the same in the end."""

DISKS = (8, 40, 80, 100, 120, 140, 160, 200, 240, 280, 320, 360, 400, 440, 480, 520, 560, 600)
"""Sizes of disks, in kB, that are too small for a run."""

_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass
class Moment:
    """One kill, and what came of it.

    Args:
        number (`int`): number of the event, from 1.
        event (`str`): its kind.
        file (`str`): name of the file within the output folder or the cache, or the number of the step.
        torn (`bool`): whether what was written last was torn.
        outcome (`str`): `"same"`, or what was wrong.
        attempts (`int`): how often the command was started after the kill.
    """

    number: int
    event: str
    file: str
    torn: bool
    outcome: str = ""
    attempts: int = 1


class Killer:
    """Counts the events of this process under some folders, and kills it at one of them.

    Args:
        folders (list of `Path`): folders that are watched.
        number (`int`): the event to be killed at; 0 for none.
        torn (`bool`): whether to tear first what was opened last to be written.
    """

    def __init__(self, folders: list[Path], number: int, torn: bool) -> None:
        self.folders, self.number, self.torn = [str(folder) for folder in folders], number, torn
        self.events: list[tuple[str, str]] = []
        self.written: str | None = None

    def watch(self) -> None:
        """Begin to count."""
        from memcontrol_hf import MemControlTrainer

        sys.addaudithook(self._heed)
        sync, step = os.fsync, MemControlTrainer.training_step

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._count("sync", path)
            sync(descriptor)
            if path == self.written:
                self.written = None  # what is on the disk is not torn any more

        def training_step(trainer, *args, **kwargs):
            self._count("step", "", str(trainer.state.global_step))
            return step(trainer, *args, **kwargs)

        os.fsync, MemControlTrainer.training_step = fsync, training_step

    def _heed(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, os.PathLike)) and args[2] & _WRITES:
            path = os.path.abspath(args[0])
            if self._count("open", path):
                self.written = path
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree"):
            path = os.path.abspath(os.fsdecode(args[0])) if not isinstance(args[0], int) else ""
            if os.path.exists(path) != (event == "os.mkdir"):  # what changes nothing is no moment
                self._count(event.rpartition(".")[2], path)

    def _count(self, kind: str, path: str, name: str | None = None) -> bool:
        """Count an event, if it is under the folders; kill the process when it is the one."""
        root = next((folder for folder in self.folders if path.startswith(folder)), None)
        if root is None and name is None:
            return False
        self.events.append((kind, name or os.path.relpath(path, root)))
        if len(self.events) == self.number:
            if self.torn:
                self._tear(path)
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def _tear(self, path: str) -> None:
        if path.endswith(".journal"):
            with open(path, "ab", buffering=0) as journal:
                os.write(journal.fileno(), b'{"op_code":8,"worker_id":"3f')
        elif self.written and os.path.isfile(self.written) and not self.written.endswith(".journal"):
            os.truncate(self.written, os.path.getsize(self.written) // 2)


def run_watched(command: list[str], folders: list[Path], number: int, torn: bool, events: Path | None) -> None:
    """Run the command in this process, and write what was counted."""
    import datasets.config
    import torch

    from memcontrol_hf import train

    torch.set_num_threads(1)
    gc.freeze()  # what was loaded before is not gone through again
    datasets.config.HF_DATASETS_CACHE = folders[1]
    with open(folders[0].parent.with_suffix(".log"), "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    killer = Killer(folders, number, torn)
    killer.watch()
    train.main(command)
    if events is not None:
        events.write_text(json.dumps(killer.events), encoding="utf-8")


def make_assets(folder: Path) -> list[str]:
    """A tiny pipeline, a tiny encoder and forty images; the flags of a run on them."""
    from conftest import RESOLUTION, images_of, tiny_pipeline
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    tiny_pipeline().save_pretrained(folder / "tiny-sd")
    ResNetModel(
        ResNetConfig(embedding_size=2, hidden_sizes=[2, 3], depths=[1, 1], layer_type="basic")
    ).save_pretrained(folder / "encoder")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "encoder")
    (folder / "images").mkdir()
    lines = []
    for i, row in enumerate(images_of(40, seed=3)):
        row["image"].save(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": row["text"]}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [
        *("--pretrained_model_name_or_path", str(folder / "tiny-sd"), "--train_data_dir", str(folder / "images")),
        *("--encoder", str(folder / "encoder"), "--resolution", str(RESOLUTION), "--train_batch_size", "4"),
        *("--max_train_steps", "6", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"),
        *("--search_max_steps", "3", "--n_trials", "4", "--screen_steps", "8", "--seed", "3", "--objectives", "loss"),
        *("--eval_num_images", "4", "--eval_inference_steps", "2", "--audit_num_prompts", "4"),
        *("--audit_images_per_prompt", "3"),
    ]


class Matrix:
    """Runs that are killed, and compared with one that is not.

    Args:
        folder (`Path`): folder for the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flags = make_assets(folder)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["memcontrol_hf.train", "memcontrol_hf.workflow", "memcontrol_hf.from_flags"]
        )
        events = folder / "events.json"
        if self._run("whole", 0, False, events) != 0:
            raise RuntimeError("the command fails, even where nobody kills it")
        self.events: list[tuple[str, str]] = [tuple(event) for event in json.loads(events.read_text("utf-8"))]
        self._expected = self._ends("whole")

    def moment(self, number: int, torn: bool, attempts: int = 2) -> Moment:
        """Kill a run at an event, start the same command again, and compare what it leaves."""
        kind, file = self.events[number - 1]
        moment, name = Moment(number, kind, file, torn), f"{number}-{torn}"
        killed = self._run(name, number, torn)
        if killed != -signal.SIGKILL:
            moment.outcome = f"was not killed: exit code {killed}"
            return moment
        while (code := self._run(name, 0, False)) != 0 and moment.attempts < attempts:
            moment.attempts += 1
        differing = [file for file, content in self._ends(name).items() if content != self._expected[file]]
        moment.outcome = f"exit code {code}" if code else f"differs: {', '.join(differing)}" if differing else "same"
        if moment.outcome == "same":
            shutil.rmtree(self.folder / name)
        return moment

    def full_disk(self, kilobytes: int) -> Moment:
        """Run the command on a disk of some size, which has to end in one line; then make room and run it again."""
        name = f"disk-{kilobytes}"
        moment, folder = Moment(0, "full disk", f"{kilobytes} kB", False), self.folder / name
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
        try:
            if (code := self._run(name, 0, False)) not in (1, 2):
                moment.outcome = f"was not full: exit code {code}"
                return moment
            log = folder.with_suffix(".log").read_text(encoding="utf-8")
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            code = self._run(name, 0, False)
            differing = [file for file, content in self._ends(name).items() if content != self._expected[file]]
            if "Traceback" in log or "\nerror: " not in log:
                moment.outcome = "not said in one line"
            else:
                moment.outcome = f"exit code {code}" if code else f"differs: {differing}" if differing else "same"
            return moment
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    def _run(self, name: str, number: int, torn: bool, events: Path | None = None) -> int:
        folders = [self.folder / name / "out", self.folder / name / "cache"]
        folders[1].mkdir(parents=True, exist_ok=True)
        command = [*self.flags, "--output_dir", str(folders[0])]
        process = self._context.Process(target=run_watched, args=(command, folders, number, torn, events))
        process.start()
        process.join()
        return process.exitcode

    def _ends(self, name: str) -> dict[str, bytes]:
        """The files of [`ENDS`]. Trials are numbered as if none had been lost: a lost one keeps its number."""
        folder = self.folder / name / "out"
        ends = {file: (folder / file).read_bytes() if (folder / file).exists() else b"" for file in ENDS}
        if not all(ends.values()):
            return ends
        config, report = (json.loads(ends[file]) for file in ENDS[1:3])
        numbers = sorted(trial["number"] for trial in report["search"]["trials"])
        for trial in report["search"]["trials"]:
            trial["number"] = numbers.index(trial["number"])
        config["search"]["trial"] = numbers.index(config["search"]["trial"])
        report["search"]["failed_trials"] = 0
        report["audit"]["data_fingerprint"] = ""  # it has a random key in each folder
        for file in (ENDS[1], "pareto_front.png"):  # digests of files that name the trial by its number
            report["weights"][file] = ""
        return ends | {ENDS[1]: json.dumps(config).encode(), ENDS[2]: json.dumps(report).encode()}


def spread(events: list[tuple[str, str]], count: int) -> list[int]:
    """Numbers of at least `count` events: of each kind and each place, as equally many as there are of them."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, (kind, file) in enumerate(events, 1):
        groups.setdefault((kind, file.partition("/")[0] if kind != "step" else ""), []).append(number)
    chosen, share = set(), 0
    while len(chosen) < min(count, len(events)):
        share += 1
        for numbers in groups.values():
            chosen |= {numbers[round(i * (len(numbers) - 1) / max(1, share - 1))] for i in range(share)}
    return sorted(chosen)


def _key(moment: dict) -> tuple[int, bool]:
    """The number of a moment, or minus the size of a disk; and whether something was torn."""
    return moment["number"] or -int(moment["file"].split()[0]), moment["torn"]


def write(file: Path, events: list[tuple[str, str]], moments: list[dict]) -> None:
    """Write the result, and its page beside it."""
    result = {
        "events": dict(Counter(kind for kind, _ in events)),
        "killed": sum(moment["number"] > 0 for moment in moments),
        "full_disks": sum(moment["number"] == 0 for moment in moments),
        "same": sum(moment["outcome"] == "same" for moment in moments),
        "moments": moments,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(render(result), encoding="utf-8")


def render(result: dict) -> str:
    """The page."""
    lines = [
        "# Killed at many moments",
        "",
        f"`make faults`: {result['killed']} kills among the {sum(result['events'].values())} moments of the command, "
        f"and {result['full_disks']} disks that were too small. {result['same']} of "
        f"{result['killed'] + result['full_disks']} ended as if nothing had happened.",
        "",
        "| moment | event | file, or number of the step | torn | outcome |",
        "|---:|---|---|---|---|",
    ]
    for moment in result["moments"]:
        torn = "yes" if moment["torn"] else ""
        lines.append(f"| {moment['number']} | {moment['event']} | `{moment['file']}` | {torn} | {moment['outcome']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the matrix and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=80, help="at least so many kills")
    parser.add_argument("--output", type=Path, default=Path("outputs/kill_moments.json"))
    parser.add_argument("--disks", type=int, nargs="*", default=DISKS, help="sizes of full disks, kB; as root only")
    args = parser.parse_args()
    done = json.loads(args.output.read_text("utf-8"))["moments"] if args.output.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        matrix = Matrix(Path(temporary))
        known = {_key(moment): moment for moment in done}
        print(f"{len(matrix.events)} events: {dict(Counter(kind for kind, _ in matrix.events))}", flush=True)
        turns = [(number, turn % 2 == 1) for turn, number in enumerate(spread(matrix.events, args.moments))]
        tries = {key: partial(matrix.moment, *key) for key in turns}
        if os.geteuid() == 0:
            tries |= {(-size, False): partial(matrix.full_disk, size) for size in args.disks}
        for key, attempt in tries.items():
            if key in known:
                continue
            started = time.monotonic()
            moment = attempt()
            known[key] = asdict(moment)
            print(f"{moment} ({time.monotonic() - started:.0f} s)", flush=True)
            write(args.output, matrix.events, [known[key] for key in sorted(known)])
    failed = [moment for moment in known.values() if moment["outcome"] != "same"]
    print(f"{len(known)} faults, {len(failed)} that did not end as if nothing had happened")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
