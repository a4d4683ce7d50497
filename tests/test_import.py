"""Importing the package in a new process: it registers the PEFT method, and loads no heavy library too early."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from memcontrol_hf import MemControlConfig

CARD = Path(__file__).parent.parent / "model_cards" / "demo-svdiff"
HEAVY = {"torch", "diffusers", "transformers", "peft", "datasets", "optuna", "sqlalchemy", "networkx", "numpy"}
KNOWN = "from peft import PeftConfig; print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)"
WITHOUT_A_TABLE = "lambda peft: delattr(peft.mapping, 'PEFT_TYPE_TO_PREFIX_MAPPING')"


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import sys; {code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def loaded_by(code: str, *arguments: object) -> set[str]:
    result = python(f"{code}; print(); print(*sys.modules)", *arguments)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "from memcontrol_hf import cli; cli.main(['card', sys.argv[1]])",
        "from memcontrol_hf import MemorizationReport as R; R.from_json(sys.argv[1] + '/memorization_report.json')"
        ".summary(); from memcontrol_hf.report.card import write_card; write_card(sys.argv[1])",
        "from memcontrol_hf.report import load_gate; load_gate()",
    ],
    ids=["memcontrol card", "a report and its card", "a gate"],
)
def test_reports_and_cards_load_no_library_that_computes(tmp_path, code):
    shutil.copytree(CARD, tmp_path / CARD.name)
    assert not HEAVY & loaded_by(code, tmp_path / CARD.name)


@pytest.mark.parametrize(
    "imports",
    [
        "import memcontrol_hf; from peft import PeftModel",
        "from peft import PeftModel; import memcontrol_hf",
        "import memcontrol_hf.masks; from diffusers import UNet2DConditionModel",
        "import memcontrol_hf.tuners",
        "from memcontrol_hf import MemControlConfig",
    ],
)
def test_peft_knows_the_method_whatever_is_imported_first(tmp_path, imports):
    MemControlConfig(method="norm").save_pretrained(tmp_path)
    result = python(f"{imports}; {KNOWN}", tmp_path)
    assert result.stdout.splitlines()[-1:] == ["MemControlConfig"], result.stderr


def test_without_the_import_peft_says_what_the_first_line_of_the_cards_code_says():
    said = re.search(r"import memcontrol_hf  # .* PEFT says (.*)", (CARD / "README.md").read_text())[1]
    result = python("from peft import PeftModel; PeftModel.from_pretrained(None, sys.argv[1])", CARD)
    assert result.stderr.splitlines()[-1] == said


def test_peft_knows_the_method_in_a_process_that_only_unpickles_a_config(tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(MemControlConfig(method="norm")))
    MemControlConfig(method="norm").save_pretrained(tmp_path)
    unpickle = "import pickle, pathlib; pickle.loads(pathlib.Path(sys.argv[1], 'config.pickle').read_bytes())"
    result = python(f"{unpickle}; {KNOWN}", tmp_path)
    assert result.stdout.splitlines()[-1:] == ["MemControlConfig"], result.stderr


@pytest.mark.parametrize(
    "code",
    [
        f"import peft; ({WITHOUT_A_TABLE})(peft); import memcontrol_hf",
        f"import wrapt; wrapt.when_imported('peft')({WITHOUT_A_TABLE}); import memcontrol_hf; import peft",
    ],
    ids=["PEFT first", "PEFT second"],
)
def test_a_peft_that_is_not_supported_is_named_whatever_is_imported_first(code):
    result = python(code)
    assert result.returncode == 1
    assert "ImportError: memcontrol_hf cannot register its method with peft" in result.stderr
    assert "which lacks PEFT_TYPE_TO_PREFIX_MAPPING" in result.stderr


def test_public_names_are_there_without_an_import_of_their_own(tmp_path):
    names = json.dumps(["demo.DEMO_PIPELINE", "demo_dataset", "metrics.fid", "search.select_run", "select_run"])
    code = f"import memcontrol_hf, operator; [operator.attrgetter(n)(memcontrol_hf) for n in {names}]"
    assert python(code).returncode == 0
    result = python("import memcontrol_hf; memcontrol_hf.nothing")
    assert "AttributeError: module 'memcontrol_hf' has no attribute 'nothing'" in result.stderr


def test_what_a_subprocess_of_the_tests_computes_stays_out_of_the_users_cache():
    names = [f"{library}_CACHE" for library in ("HF_DATASETS", "HF_EVALUATE", "HF_METRICS", "HF_MODULES")]
    result = python(f"import datasets.config as c, os; print(c.HF_DATASETS_CACHE, *map(os.getenv, {names}))")
    folders = [Path(folder) for folder in result.stdout.split()]
    assert len(folders) == 5 and all(Path(tempfile.gettempdir()) in folder.parents for folder in folders)
