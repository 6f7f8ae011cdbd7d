"""The command doctor: what it finds here, what it says of what is broken, and how fast."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.machine import doctor
from resa_lens.machine import hardware as machine


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["doctor", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def found(args: list[str | Path], code: int = 0) -> dict[str, Any]:
    return json.loads(invoke(*args, "--json", code=code).stdout)


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in result["findings"]}


def test_here_the_main_job_can_run(tmp_path: Path):
    result = found(["--workspace", tmp_path / "w", "--model", "tiny-reasoner"])
    assert result["ok"]
    assert result["problems"] == []
    rows = by_name(result)
    assert rows["torch"]["found"] == metadata.version("torch")
    assert rows["folder"]["found"] == f"{tmp_path / 'w'} (to be made)"
    assert result["engines"]["hf"]
    assert result["model"]["shape"]["layers"] == 12
    assert all(result["model"]["fits"].values())
    assert not (tmp_path / "w").exists()


def test_the_table_names_everything_and_its_remedies(tmp_path: Path):
    text = invoke("--workspace", tmp_path, "--model", "tiny-reasoner").stdout
    for said in ("transformer-lens", "extra app", "offline mode", "tuning, preset paper",
                 "the main job can run: resa-lens demo"):  # fmt: skip
        assert said in text, said


def test_a_process_of_its_own_loads_no_torch(cli, tmp_path: Path):
    import subprocess
    import sys

    if machine.nvidia_driver():
        pytest.skip("this machine has a GPU, which torch is asked about")
    code = (
        "import sys\nfrom resa_lens.cli import app\n"
        f"app(['doctor', '--model', 'tiny-reasoner', '--workspace', {str(tmp_path)!r}], "
        "standalone_mode=False)\n"
        "print('loaded:', sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("loaded: []")


def broken(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: version if n == name else real(n))


def test_a_missing_package_is_a_problem_with_its_remedy(monkeypatch, tmp_path: Path):
    broken(monkeypatch, "peft", None)
    result = found(["--workspace", tmp_path], code=1)
    assert not result["ok"]
    (problem,) = result["problems"]
    pin = doctor.tested_versions()["peft"]
    assert problem == {"what": "peft: missing", "remedy": f"pip install 'peft=={pin}'"}
    text = invoke("--workspace", tmp_path, code=1).stdout
    assert "1 problem(s): the main job cannot run as it is" in text


def test_versions_outside_and_beside_the_tested_ones(monkeypatch, tmp_path: Path):
    broken(monkeypatch, "peft", "0.1.0")
    assert "0.1.0, outside" in found(["--workspace", tmp_path], code=1)["problems"][0]["what"]
    broken(monkeypatch, "numpy", "2.0.1")
    monkeypatch.setattr(doctor, "_requirements", lambda: iter([(Requirement("numpy>=2.0"), "")]))
    row = by_name(found(["--workspace", tmp_path]))["numpy"]
    assert (row["state"], row["found"].partition(";")[0]) == ("note", "2.0.1")


def test_missing_extras_have_their_commands(monkeypatch, tmp_path: Path):
    for name in ("streamlit", "nbclient", "lighteval", "vllm"):
        broken(monkeypatch, name, None)
    monkeypatch.setattr(doctor, "_environment", lambda folder: None)
    rows = by_name(found(["--workspace", tmp_path]))
    assert rows["extra app"]["remedy"] == "pip install 'resa-lens[app]'"
    assert rows["extra notebooks"]["remedy"] == "pip install 'resa-lens[notebooks]'"
    assert rows["extra eval"]["remedy"] == "benchmarks/install_engine.sh lighteval .venv-eval"
    assert rows["extra vllm"]["remedy"] == "benchmarks/install_engine.sh vllm .venv-vllm"


def test_an_engine_in_an_environment_of_its_own(monkeypatch, tmp_path: Path):
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.chdir(tmp_path)
    result = found(["--workspace", tmp_path / "w"])
    assert result["engines"]["vllm"]
    assert "bin/resa-lens eval --engine vllm" in by_name(result)["vllm"]["found"]


def test_little_memory_and_a_full_disk(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(machine, "available_mb", lambda: 300.0)
    usage = type("Usage", (), {"free": 10 * machine.MB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    result = found(["--workspace", tmp_path, "--model", "tiny-reasoner"], code=1)
    assert {p["what"].partition(":")[0] for p in result["problems"]} == {"memory", "disk"}
    assert not result["model"]["fits"]["load"]


def test_a_workspace_that_cannot_be_written(monkeypatch, tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is a file" in invoke("--workspace", tmp_path / "file", code=2).stderr
    monkeypatch.setattr("os.access", lambda *args: False)
    (problem,) = found(["--workspace", tmp_path], code=1)["problems"]
    assert "no permission to write" in problem["what"]


def test_a_driver_without_a_build_for_it(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "580.1")
    broken(monkeypatch, "torch", "2.13.0+cpu")
    row = by_name(found(["--workspace", tmp_path]))["cuda"]
    assert row["state"] == "note"
    assert "build without CUDA" in row["found"]


def test_a_model_that_is_not_at_hand():
    said = invoke("--model", "nobody/nothing", code=2).stderr
    assert "error: model 'nobody/nothing' is not in the local hub cache" in said
    assert "hf download nobody/nothing" in said


def test_cores_heed_a_containers_quota(monkeypatch, tmp_path: Path):
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text",
        lambda self, *a, **k: "100000 100000" if self.name == "cpu.max" else real(self, *a, **k),
    )  # fmt: skip
    assert machine.cores() == 1


# Data


def test_three_documents_with_phases_tokens_and_tags(tmp_path: Path):
    file = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}.\n#### {n + 1}"}
            for n in range(4)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--data", file, "--model", "tiny-reasoner", "--workspace", tmp_path / "w"]
    data = found(args)["data"]
    assert (data["records"], data["with_steps"], data["plain_texts"]) == (4, 4, 0)
    assert len(data["documents"]) == 3
    for document in data["documents"]:
        tokens = document["tokens"]
        assert {token["phase"] for token in tokens} == {"prompt", "think", "answer"}
        tags = {token["tag"] for token in tokens} - {None}
        assert tags == {"<think>", "</think>", "<answer>", "</answer>"}
        phases = [token["phase"] for token in tokens]
        assert phases == sorted(phases, key=["prompt", "think", "answer"].index)
    thoughts = [
        "".join(t["text"] for t in document["tokens"] if t["phase"] == "think")
        for document in data["documents"]
    ]
    assert ["=" in thought for thought in thoughts] == [False, False, True]
    shown = invoke(*args).stdout
    assert shown.count("[<think>]") >= 3
    assert "record 3, with its steps" in shown


def test_data_that_cannot_be_read_and_data_of_nobody(tmp_path: Path):
    file = tmp_path / "bad.csv"
    file.write_text("question,answer\nWhat is 1,000 + 1?,1001\n")
    place = ("--workspace", tmp_path / "w")
    said = invoke("--data", file, "--model", "tiny-reasoner", *place, code=2).stderr
    assert "row 1 (line 2) has 3 cells" in " ".join(said.split())
    assert "goes with --model" in invoke("--data", file, *place, code=2).stderr
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "Once upon a time."}\n')
    data = found(["--data", plain, "--model", "tiny-reasoner", *place])["data"]
    assert (data["records"], data["plain_texts"]) == (1, 1)
