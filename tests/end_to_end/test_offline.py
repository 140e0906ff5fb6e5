"""Off line: what a run takes from the hub is fetched beforehand, and then no connection is tried. The hub is a stand-in
server on this machine; the second check is the system's: a network namespace without interfaces. End to end because
caches and offline modes are read from the environment when libraries are imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub_process import hub_of
from one_process import answers
from ready_process import TIMEOUT
from tiny_llama import byte_tokenizer, tiny_llama

from besa_exp.cli.main import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEYS = ["calibration=wikitext2", "evaluator=none", "evaluator.perplexity_sets=[wikitext2]"]
KEYS += ["evaluator.tasks=[openbookqa]"]
HELD = {"only/pickled": "pytorch_model.bin", "stand/in": "model.safetensors"}  # what is fetched for model.convert=true
WATCHED = """
import json, sys

def watch(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and not isinstance(arguments[1], (str, bytes))):
        print("CONNECTION", event, arguments[:2], file=sys.stderr, flush=True)

sys.addaudithook(watch)
from besa_exp.cli.main import main
from besa_exp.machine.process import run_as_process

def run():
    print("CODES", *[main(words) for words in json.loads(sys.argv[1])])
    return 0

run_as_process(run)
"""
CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: main/{split}-*\n" for split in ("train", "validation", "test")
)


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub with a tiny model, a WikiText-2 of our own and eight questions of openbookqa."""
    root = tmp_path_factory.mktemp("hub")
    model = root / "models" / "stand" / "in"
    tiny_llama(64).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (model / "consolidated.safetensors").write_text("the same weights in a form that is not read")
    pickled = root / "models" / "only" / "pickled"
    shutil.copytree(model, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny_llama(64).state_dict(), pickled / "pytorch_model.bin")
    (model / "pytorch_model.bin").write_text("the same weights, which are not fetched beside safetensors")
    sets = root / "datasets"
    for split in ("train", "test"):
        rows = [{"text": f"Line {number} of a text that nobody needs to read. " * 3} for number in range(40)]
        write_parquet(sets / f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", rows)
    choices = {"text": ["red", "blue", "one", "two"], "label": ["A", "B", "C", "D"]}
    questions = [{"question_stem": f"It is {n}", "choices": choices, "answerKey": "ABCD"[n % 4]} for n in range(8)]
    for split in ("train", "validation", "test"):
        write_parquet(sets / f"allenai/openbookqa/main/{split}-00000-of-00001.parquet", questions)
    (sets / "allenai/openbookqa/README.md").write_text(CARD + "---\n")
    with hub_of(root) as address:
        yield address


@dataclass(frozen=True)
class Fetched:
    """A folder in which `besa prefetch` was called, the environment that names its caches, and what became of: all of
    KEYS, then each model of HELD without and with model.convert=true."""

    work: Path
    environment: dict[str, str]
    told: list[tuple[int, str]]

    @property
    def manifests(self) -> list[list[dict]]:
        """The items of each."""
        paths = (self.work / "outputs").glob("prefetch-*.json")
        return [json.loads(path.read_text())["items"] for path in paths]


@pytest.fixture(scope="module")
def fetched(hub: str, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    work = tmp_path_factory.mktemp("work")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(work / "caches"), "HF_ENDPOINT": hub, "OMP_NUM_THREADS": "1"}
    alone = [
        [f"model.path={model}", "evaluator=none", *more] for model in HELD for more in ([], ["model.convert=true"])
    ]
    commands = [["prefetch", *words] for words in (["model.path=stand/in", *KEYS], *alone)]
    return Fetched(work, environment, answers([(hub, words) for words in commands], environment, work))


def test_the_manifest_says_what_lies_where_in_which_version(fetched: Fetched) -> None:
    code, said = fetched.told[0]
    assert code == 0, said
    assert "4 of 4 are on this machine" in said
    (items,) = (items for items in fetched.manifests if len(items) == 4)
    assert [(item["kind"], item["name"], item["status"]) for item in items] == [
        ("model", "stand/in", "fetched"),
        ("calibration", "wikitext2", "fetched"),
        ("perplexity", "wikitext2", "fetched"),
        ("task", "openbookqa", "fetched"),
    ]
    assert {item["commit"] for item in items} == {COMMIT}
    model = items[0]
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(model["files"])
    for name, size in model["files"].items():
        assert (Path(model["where"]) / name).stat().st_size == size
    assert Path(items[1]["where"]).is_file()
    assert items[1]["filename"] != items[2]["filename"]


NO_INTERFACES = ["unshare", "-rn"]
MAY = (
    shutil.which("unshare") is not None
    and subprocess.run([*NO_INTERFACES, "true"], capture_output=True).returncode == 0
)


@pytest.fixture(scope="module")
def ran(fetched: Fetched) -> subprocess.CompletedProcess[str]:
    """Runs off line in one process that tells its connections, where it may in a network without interfaces."""
    small = ["calibration.num_samples=2", "calibration.seq_len=32", "device=cpu", "offline=true"]
    small.append("save.verify=false")  # in a process of its own
    scored = [*KEYS, "evaluator.limit=2", "evaluator.seq_len=32", "pruner=wanda", "tracker=wandb"]
    runs = [["prune", "model.path=stand/in", *scored, *small, "hydra.run.dir=run"]]
    converted = ["evaluator=none", "pruner=magnitude", "tracker=none", "model.convert=true", "save.model=false", *small]
    runs += [["prune", f"model.path={model}", *converted, f"hydra.run.dir={Path(model).name}"] for model in HELD]
    command = [*(NO_INTERFACES if MAY else []), sys.executable, "-c", WATCHED, json.dumps(runs)]
    asked = {"cwd": fetched.work, "env": fetched.environment, "timeout": TIMEOUT}
    return subprocess.run(command, capture_output=True, text=True, **asked)


def test_a_run_off_line_uses_the_caches_in_a_network_without_interfaces(hub: str, fetched: Fetched, ran) -> None:
    if not MAY:
        pytest.skip("this system lets no user make a network namespace (unshare -rn)")
    reach = f"import urllib.request as r; r.urlopen('{hub}', timeout=5)"
    assert subprocess.run([sys.executable, "-c", reach]).returncode == 0, "the stand-in server is there"
    assert subprocess.run([*NO_INTERFACES, sys.executable, "-c", reach], capture_output=True).returncode != 0
    assert ran.stdout.splitlines()[-1].startswith("CODES 0 "), ran.stdout + ran.stderr
    assert "CONNECTION" not in ran.stderr
    run = fetched.work / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["unavailable"] == {}
    assert results["perplexity"]["wikitext2"] > 1
    assert set(results["zero_shot"]) == {"openbookqa"}
    assert list((run / "wandb").glob("offline-run-*"))


def test_prefetch_with_convert_fetches_what_a_run_with_convert_loads_off_line(fetched: Fetched, ran) -> None:
    _, (refused, said), pickled, plain, converted = fetched.told
    assert refused == 1
    assert "only pickled weights" in said
    assert [code for code, _ in (pickled, plain, converted)] == [0, 0, 0]
    items = [item for manifest in fetched.manifests for item in manifest if item["convert"]]
    files = {
        item["name"]: [name for name in item["files"] if name.endswith((".bin", ".safetensors"))] for item in items
    }
    assert files == {model: [file] for model, file in HELD.items()}
    assert ran.stdout.splitlines()[-1] == "CODES 0 0 0", ran.stdout + ran.stderr


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches with nothing in them, and an empty folder to work in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


MISSING = [
    "model owner/name",
    "calibration c4 (en/c4-train.00000-of-01024.json.gz of allenai/c4)",
    "perplexity set wikitext2 (wikitext-2-raw-v1/test-00000-of-00001.parquet of Salesforce/wikitext)",
    "task piqa (baber/piqa)",
    "task arc_challenge (ARC-Challenge of allenai/ai2_arc)",
]
FETCHES = (
    "besa prefetch model.path=owner/name model.revision=v2 calibration=c4 evaluator=none "
    "'evaluator.perplexity_sets=[wikitext2]' 'evaluator.tasks=[piqa,arc_challenge]'"
)
ASKED = ["model.path=owner/name", "model.revision=v2", "calibration=c4", "evaluator=none"]
ASKED += ["evaluator.perplexity_sets=[wikitext2]", "evaluator.tasks=[piqa,arc_challenge,embedded_continuations]"]


@pytest.mark.usefixtures("empty_caches")
def test_a_run_off_line_names_all_that_is_missing_and_the_command_that_fetches_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prune", *ASKED, "pruner=wanda", "offline=true"]) == 2
    said = capsys.readouterr().err
    assert "1 problem" in said
    assert "embedded_continuations" not in said
    for what in (*MISSING, FETCHES):
        assert what in said
    assert main(["evaluate", "checkpoint=owner/name", "evaluator=paper", "offline=true"]) == 2
    said = capsys.readouterr().err
    assert "model owner/name; perplexity set wikitext2" in said
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.usefixtures("empty_caches")
@pytest.mark.parametrize("cause", ["offline=true", "no network"])
def test_prefetch_only_lists_where_there_is_no_network(cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefetch", *ASKED, *(["offline=true"] if cause == "offline=true" else [])]) == 1
    said = capsys.readouterr()
    assert "0 of 5 are on this machine" in said.out
    assert "5 missing; nothing was downloaded" in said.err
    assert ("offline=true" if cause == "offline=true" else "does not answer") in said.err
    assert FETCHES in said.err
    (path,) = Path("outputs").glob("prefetch-*.json")
    assert {item["status"] for item in json.loads(path.read_text())["items"]} == {"missing"}


@pytest.mark.usefixtures("empty_caches")
def test_prefetch_says_where_nothing_is_needed_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefetch"]) == 0
    assert "nothing is needed from the hub" in capsys.readouterr().out
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.usefixtures("empty_caches")
def test_prefetch_takes_a_sweep_as_prune_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefetch", "-m", "model.path=a/one,a/two", "pruner=wanda,besa", "offline=true"]) == 1
    assert "0 of 2 are on this machine" in capsys.readouterr().out


@pytest.mark.usefixtures("empty_caches")
def test_prefetch_refuses_what_prune_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefetch", "model=lama2_7b", "calibration.num_samples=0", "evaluator.tasks=[piqaa]"]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    for told in ("did you mean", "calibration.num_samples=0", "did you mean piqa or "):
        assert told in said


@pytest.mark.usefixtures("empty_caches")
def test_a_model_without_all_its_shards_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    tiny_llama().save_pretrained(snapshot, max_shard_size="100KB")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    assert main(["prefetch", "model.path=owner/name", "offline=true", "evaluator=none"]) == 0
    assert "1 of 1 are on this machine" in capsys.readouterr().out
    sorted(snapshot.glob("*.safetensors"))[-1].unlink()
    assert main(["prefetch", "model.path=owner/name", "offline=true", "evaluator=none"]) == 1
    assert "which its index names" in capsys.readouterr().out
