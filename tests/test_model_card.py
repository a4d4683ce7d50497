"""The cards: what they say, that nothing in them is a placeholder, and that no text of a user becomes markup."""

import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from conftest import adapter_folder, small_report
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from memcontrol_hf import MemorizationReport, cli
from memcontrol_hf.adapter_folder import changed_files
from memcontrol_hf.demo import DEMO_PIPELINE
from memcontrol_hf.masks import block_map
from memcontrol_hf.report import REPORT_SCHEMA
from memcontrol_hf.report.card import write_card
from memcontrol_hf.report.loading_snippet import OUR_METHODS, loading_snippet
from memcontrol_hf.report.screening_table import screening_table
from memcontrol_hf.tuners import METHODS

MODEL_CARDS = Path(__file__).parent.parent / "model_cards"
HOSTILE = (
    "a`b|c*d*\n\n# e <script>alert(1)</script> [f](https://evil.example) www.evil.example $g$ \x00 {{ 7 * 7 }} &lt;"
)


def rendered(folder: Path, report: MemorizationReport) -> ModelCard:
    folder.mkdir(exist_ok=True)
    report.to_json(folder / "memorization_report.json")
    return ModelCard.load(write_card(folder))


def html(card: ModelCard) -> str:
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.text)


class Tags(HTMLParser):
    """All tags of a page, the addresses that it links to, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def headings(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.*)$", card.text, re.MULTILINE)


def small_screening() -> dict:
    figures = {
        "learns": (0.03, 0.01, -0.002),
        "memorizes": (0.0, 0.004, 0.004),
        "learns_error": (0.002, 0.001, None),
        "memorizes_error": (0.0008, 0.0, 0.0),
        "parameters": (5, 6, 7),
    }
    settings = {"steps": 80, "every": 4, "learning_rate": 1e-3, "seeds": 1, "seed": 0}
    return {k: dict(zip(small_report().mask, v)) for k, v in figures.items()} | {"settings": settings, "version": 1}


@pytest.mark.parametrize(("passed", "verdict"), [(True, "passed."), (False, "FAILED."), (None, "not applied.")])
def test_the_verdict_comes_first_and_the_parts_in_their_order(tmp_path, passed, verdict):
    card = rendered(tmp_path, small_report(passed))
    lines = [line for line in card.text.splitlines() if line and not line.startswith("# ")]
    assert lines[0].startswith(f"**Release gate: {verdict}**") and "**No formal guarantee:**" in lines[0]
    assert headings(card) == [
        *("Use", "Quality and memorization", "What was tuned", "How it was found"),
        *(["How it was attacked"] if passed is not None else []),
        *("Limits", "Repeat it"),
    ]


@pytest.mark.parametrize(
    "report",
    [
        small_report(),
        small_report(False),
        small_report(None),
        small_report(None, figures={}, training={}, images={}, search=None, command=None),
        small_report(base_model="demo", card={"hub_model_id": "tester/emoji", "license": "mit"}),
        small_report(
            training={**small_report().training, "mitigations": ["rwa:n=4"], "stopped_at_step": {"all blocks": 5}}
        ),
        small_report(card={"export": {"format": "lora", "rank": 4, "relative_error": 0.25}}),
        small_report(card={"export": {"format": "merged"}}),
        small_report(card={"denoiser": "transformer", "example_inputs": {"class_labels": [7]}}),
        small_report(screening=small_screening()),
    ],
    ids=[
        "passed",
        "failed",
        "no gate",
        "nothing measured",
        "demo",
        "mitigations",
        "lora",
        "merged",
        "classes",
        "screened",
    ],
)
def test_no_card_has_a_placeholder_and_every_snippet_is_python(tmp_path, report):
    card = rendered(tmp_path, report)
    assert not re.search(r"\{\{|\}\}|\bNone\b|\bnan\b|Undefined|More Information|  +[a-z]|\n\n\n", card.text)
    ast.parse(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1])
    page = Tags(html(card))
    assert page.tags.count("h1") == 1 and ("table" in page.tags) == bool(report.mask)
    jsonschema.validate(json.loads((tmp_path / "memorization_report.json").read_text()) | {"search": None},
                        json.loads(REPORT_SCHEMA.read_text()))  # fmt: skip
    assert len(card.text.split()) < 900, "it is short"


@pytest.mark.parametrize("folder", MODEL_CARDS.glob("*-svdiff"), ids=lambda folder: folder.name)
def test_a_published_report_of_a_training_and_its_search_follows_the_schema(folder):
    report = json.loads((folder / "memorization_report.json").read_text(encoding="utf-8"))
    assert report["search"]["trials"] and report["audit"]
    jsonschema.validate(report, json.loads(REPORT_SCHEMA.read_text(encoding="utf-8")))


def test_the_card_says_what_each_block_does(tmp_path):
    card = rendered(tmp_path, small_report(screening=small_screening()))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in card.text.splitlines()
        if line.startswith("|") and " ± " in line
    ]
    assert rows == [
        ["`mid_block.attentions.0`", "□", "75 ± 5 %", "0 ± 10 %"],
        ["`up_blocks.1.attentions.0`", "■", "25 ± 2 %", "50 ± 0 %"],
        ["`up_blocks.1.attentions.1`", "□", "0 %", "50 ± 0 %"],
    ]
    assert headings(card).index("What each block does") == headings(card).index("What was tuned") + 1
    many = [f"up_blocks.{i}.attentions.0.to_{j}" for i in range(3) for j in range(12)]
    wide = {"learns": {name: 0.5 if name.startswith("up_blocks.2") else 0.25 for name in many}}
    rest = {side: dict.fromkeys(many, 0.0) for side in ("memorizes", "learns_error", "memorizes_error")}
    rows = screening_table(small_screening() | wide | rest, dict.fromkeys(many[:2], True))
    assert [row["name"] for row in rows] == ["up_blocks.0", "up_blocks.1", "up_blocks.2"]
    assert [row["learns"] for row in rows] == ["25 ± 0 %", "25 ± 0 %", "50 ± 0 %"]
    assert rows[0]["blocks"] == "■■" + 10 * "□" and rows[0]["memorizes"] == "0 %"


def test_the_snippet_loads_the_revision_of_the_base_that_was_tuned(tmp_path):
    card = rendered(tmp_path, small_report(card={"base_revision": "v2"}))
    assert 'from_pretrained("owner/base", revision="v2")' in card.text


@pytest.mark.parametrize("export_format", [None, "lora", "merged"])
@pytest.mark.parametrize("base", ["owner/base", "demo"])
def test_the_snippet_loads_the_base_in_the_precision_and_variant_of_the_training(export_format, base):
    training = {"base_weights": "bfloat16:0123"}
    report = small_report(base_model=base, training=training, card={"base_variant": "fp16"} if base != "demo" else {})
    lines = loading_snippet(report, "x", export_format, ("",)).splitlines()
    assert "import torch" in lines
    place = "" if base == "demo" else '"owner/base", variant="fp16", '
    place = '"x", ' if export_format == "merged" else place
    assert next(line for line in lines if line.startswith("pipe = ")).endswith(f"({place}torch_dtype=torch.bfloat16)")
    report.training["base_weights"] = "float32:0123"
    assert "torch" not in loading_snippet(report, "x", export_format, ("",))
    report.training["base_weights"] = "float16);evil(:0123"
    assert "evil" not in loading_snippet(report, "x", export_format, ("",))


def test_the_metadata_names_base_relation_library_licence_and_data(tmp_path):
    facts = {"hub_model_id": "tester/x", "license": "apache-2.0", "datasets": ["owner/public"]}
    data = rendered(tmp_path, small_report(card=facts)).data
    assert (data.base_model, data.base_model_relation) == ("owner/base", "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-to-image", "apache-2.0")
    assert data.datasets == ["owner/public"] and data.tags[:2] == ["memcontrol", "svdiff"]
    local = rendered(tmp_path, small_report(base_model="my-own-base")).data
    assert local.base_model is None and local.datasets is None and local.license is None


def test_the_model_index_holds_every_figure_of_the_report(tmp_path):
    report = small_report()
    results = rendered(tmp_path, report).data.eval_results
    found = {(r.dataset_config, r.metric_type): (r.metric_value, r.metric_args) for r in results}
    figures = report.figures["selected mask"]
    expected = {}
    for name, value in figures.items():
        if not name.startswith("trainable") and not name.endswith(("_low", "_high")):
            ends = (
                {"low": figures[f"{name}_low"], "high": figures[f"{name}_high"]} if f"{name}_low" in figures else None
            )
            expected["fine-tune", name] = (value, ends)
    for name, of in report.audit["measures"].items():
        model = of["model"]
        if model["value"] is not None:
            ends = None if model["low"] is None else {"low": model["low"], "high": model["high"]}
            expected["audit", name] = (model["value"], ends)
    assert found == expected and ("audit", "extraction_rate") in found and ("fine-tune", "fid") in found


def test_a_guarantee_is_claimed_with_differential_privacy_alone(tmp_path):
    terms = {"accountant": "rdp", "noise_multiplier": 0.8, "max_grad_norm": 0.1, "sample_rate": 0.2, "steps": 50}
    spent = {"epsilon": 3.25, "delta": 1e-5, "epsilon_limit": 10.0, "says_something": True, **terms}
    training = {**small_report().training, "dp_sgd": spent}
    card = rendered(tmp_path, small_report(training=training))
    assert "ε = 3.25 at δ = 1e-05" in card.text
    assert not re.search("no formal guarantee", card.text, re.IGNORECASE)
    assert {"dp_epsilon", "dp_delta"} <= {r.metric_type for r in card.data.eval_results}
    assert "The training was differentially private: epsilon 3.25" in card.text
    spent |= {"epsilon": 40.0, "says_something": False}
    card = rendered(tmp_path, small_report(training=training))
    assert "**No formal guarantee:**" in card.text and "Too little noise" in card.text


def test_attacks_are_shown_with_interval_controls_limit_and_canaries(tmp_path):
    text = rendered(tmp_path, small_report(False)).text
    row = next(line for line in text.splitlines() if "`extraction_rate`" in line)
    assert row.endswith("| 25 % (0 % to 50 %) | 25 % | 25 % | at most 5 % ✗ |")
    row = next(line for line in text.splitlines() if "`membership_auc_loss`" in line)
    assert row.endswith("| 0.517 (0.449 to 0.585) | 0.517 | 0.517 | at most 0.65 ✓ |")
    assert "`membership_loss` 3 of 12." in text
    clean = small_report()
    clean.audit["canaries"] = {"planted": 0, "caught": {}}
    assert "**No canaries**" in rendered(tmp_path, clean).text


def test_an_audit_without_a_gate_shows_what_has_an_interval(tmp_path):
    report = small_report()
    report.gate = None
    text = rendered(tmp_path, report).text
    assert "`extraction_rate`" in text and "| none |" in text and "`amd`" not in text


def test_text_of_users_stays_text(tmp_path):
    report = small_report(
        False,
        base_model=f"x/{HOSTILE}",
        method=HOSTILE,
        encoder=HOSTILE,
        command=HOSTILE + "\n```\n# out of the block",
        mask={HOSTILE: True, "b.attentions.0": False},
        search={"sampler": HOSTILE, "objectives": [HOSTILE, "b"], "trials": []},
        training={**small_report().training, "mitigations": [HOSTILE]},
        versions={HOSTILE: HOSTILE},
        card={
            "location": HOSTILE,
            "example_inputs": {"prompt": [HOSTILE + '"""\n']},
            "license": HOSTILE,
            "datasets": [HOSTILE],
            "run_url": "javascript:alert(1)",
        },
    )
    report.figures[HOSTILE] = report.figures["selected mask"]
    report.audit["measures"][HOSTILE] = report.audit["measures"]["extraction_rate"]
    report.audit["canaries"]["caught"][HOSTILE] = {"caught": 0, "of": 1}
    report.gate["failures"].append(HOSTILE)
    report.gate["limits"][HOSTILE] = {"max": 0.5}
    card = rendered(tmp_path, report)
    assert card.data.license == HOSTILE and card.data.datasets == [HOSTILE]
    page = Tags(html(card))
    harmless = Tags(html(rendered(tmp_path, small_report(False))))
    assert "script" not in page.tags and page.tags.count("h1") == 1
    assert page.tags.count("h2") == harmless.tags.count("h2")
    assert set(page.links) - set(harmless.links) == {"#"}
    assert page.tags.count("em") == 0 and "{{ 7 * 7 }}" in page.text
    assert page.text.count("<script>alert(1)</script>") >= 10
    rows = html(card).split("<tr>")[1:]
    assert {len(re.findall("<t[dh][ >]", row)) for row in rows} == {2, 5, 6}, "no table is torn apart"
    code = ast.parse(re.search(r"````*python\n(.*?)```", card.text, re.DOTALL)[1])
    prompts = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert HOSTILE + '"""\n' in prompts


def test_a_block_map_has_a_row_for_each_part_of_the_model():
    unet = {"down_blocks.0.attentions.0": True, "down_blocks.0.attentions.1": False, "mid_block.attentions.0": True}
    assert block_map(unet) == [("down_blocks.0", "■□"), ("mid_block", "■")]
    sites = {f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn{j}": j == 1 for i in (0, 1) for j in (1, 2)}
    assert block_map(sites) == [("up_blocks.1", "■□■□")]
    assert block_map({"transformer_blocks.0": False, "transformer_blocks.1": True, "single_transformer_blocks.0": True,
                      }) == [("transformer_blocks", "□■"), ("single_transformer_blocks", "■")]  # fmt: skip
    modules = {
        "transformer_blocks.0.attn.to_q": True,
        "transformer_blocks.1.ff.net.2": False,
        "text_encoder.encoder.layers.0.self_attn.q_proj": True,
        "text_encoder.encoder.layers.0.mlp.fc1": False,
    }
    assert block_map(modules) == [("transformer_blocks", "■□"), ("text_encoder.encoder.layers", "■□")]  # fmt: skip
    assert block_map({"attn1|attn2": True, "ff": False}) == [("attn1|attn2", "■"), ("ff", "□")]


def test_a_folder_without_anything_to_say_is_refused(tmp_path, capsys):
    for arguments in ([], ["--gate", "default"]):
        assert cli.main(["card", str(tmp_path), *arguments]) == 2
    assert "holds no memorization_report.json and no mask.json" in capsys.readouterr().err


def test_the_command_renders_the_same_card_from_the_folder_alone(tmp_path, capsys):
    folder = adapter_folder(tmp_path / "adapter")
    first = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert cli.main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == first
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_an_audit_that_is_judged_again_has_the_exit_code_of_its_gate(tmp_path, capsys):
    audited = MemorizationReport.from_json(MODEL_CARDS / "demo-svdiff" / "memorization_report.json")
    folder = adapter_folder(tmp_path / "adapter", report=audited)
    (tmp_path / "gate.yaml").write_text("membership_auc_loss: {max: 0.99}\n")
    assert cli.main(["card", str(folder), "--gate", str(tmp_path / "gate.yaml")]) == 0
    assert "gate: FAILED" not in capsys.readouterr().out
    (tmp_path / "gate.yaml").write_text("membership_auc_loss: {max: 0.01}\n")
    assert cli.main(["card", str(folder), "--gate", str(tmp_path / "gate.yaml")]) == 3
    assert "gate: FAILED, membership_auc_loss: " in capsys.readouterr().out
    assert cli.main(["card", str(folder)]) == 0, "without --gate, nothing is judged"


@pytest.mark.parametrize("folder", sorted(p for p in MODEL_CARDS.glob("*") if p.is_dir()) or [None], ids=str)
def test_the_published_cards_are_what_the_code_renders(folder, tmp_path):
    assert folder is not None, f"no card in {MODEL_CARDS}"
    shutil.copytree(folder, tmp_path / folder.name)
    assert write_card(tmp_path / folder.name).read_text() == (folder / "README.md").read_text(), (
        f"render it again: memcontrol card model_cards/{folder.name}"
    )
    card = ModelCard.load(folder / "README.md")
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    assert card.data.eval_results and report.figures
    assert changed_files(folder, report.weights) == [], "these files are not those that the audit measured"


def test_the_card_of_the_demos_pipeline_is_what_the_code_renders(tmp_path):
    shutil.copytree(DEMO_PIPELINE, tmp_path / "pipeline")
    shutil.copy(DEMO_PIPELINE.parent / "training_log.json", tmp_path)
    card = ModelCard.load(write_card(tmp_path / "pipeline"))
    assert card.text.strip() == ModelCard.load(DEMO_PIPELINE / "README.md").text.strip(), (
        "render it again: memcontrol card memcontrol_hf/demo/pipeline"
    )
    assert card.data.library_name == "diffusers" and card.data.license == "apache-2.0"


def test_the_plot_of_a_search_is_drawn_from_the_report_alone(tmp_path):
    folder = MODEL_CARDS / "demo-svdiff"
    trial = json.loads((folder / "adapter_config.json").read_text())["search"]["trial"]
    code = (
        "import sys; from memcontrol_hf.report import MemorizationReport\n"
        "from memcontrol_hf.report.plots import plot_search\n"
        "report = MemorizationReport.from_json(sys.argv[1])\n"
        "plot_search(report.search, report.mask, sys.argv[2], int(sys.argv[3]), report.audit['distances'])\n"
        "print({'torch', 'optuna'} & set(sys.modules))"
    )
    arguments = [str(folder / "memorization_report.json"), str(tmp_path / "plot.png"), str(trial)]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
    assert Image.open(tmp_path / "plot.png").size == Image.open(folder / "pareto_front.png").size


def test_the_snippet_registers_every_method_that_peft_lacks():
    assert {*OUR_METHODS} == {*METHODS, "attention"}, "attention is what the training script also calls weights"
