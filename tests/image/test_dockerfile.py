"""What BuildKit itself says of the Dockerfile, and that it would say so of faults."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.process import ROOT

DIGEST = "sha256:" + "0" * 64
TEXT = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="session")
def lint() -> str:
    built = subprocess.run([ROOT / ".ci/tools/build", "dockerfile-lint"], check=True, capture_output=True, text=True)
    return built.stdout.strip()


def said(lint: str, path: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([lint, path, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_buildkit_has_nothing_to_say_of_it(lint: str) -> None:
    assert said(lint, ROOT / "Dockerfile", f"PYTHON_DIGEST={DIGEST}", f"GPU_DIGEST={DIGEST}") == (0, "")


@pytest.mark.parametrize("missing", ["PYTHON_DIGEST", "GPU_DIGEST"])
def test_a_base_without_a_digest_is_no_base(lint: str, missing: str) -> None:
    given = [f"{name}={DIGEST}" for name in ("PYTHON_DIGEST", "GPU_DIGEST") if name != missing]
    code, text = said(lint, ROOT / "Dockerfile", *given)
    assert code == 1
    assert "invalid reference format" in text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("AS cpu", "AS CPU", "StageNameCasing"),
        ("HOME=/tmp", "HOME=${NOWHERE}", "UndefinedVar"),
        ("USER=trainer", "AWS_SECRET_ACCESS_KEY=x", "SecretsUsedInArgOrEnv"),
        ('ENTRYPOINT ["python", "-m", "entrypoint"]', "ENTRYPOINT python -m entrypoint", "JSONArgsRecommended"),
        ("type=cache,target", "type=cash,target", "unsupported mount type"),
        ("COPY --from=demo", "COPY --form=demo", "unknown flag: --form"),
        ("RUN mkdir", "RAN mkdir", "unknown instruction: RAN"),
    ],
)
def test_a_fault_is_found(lint: str, tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in TEXT
    path = tmp_path / "Dockerfile"
    path.write_text(TEXT.replace(old, new))
    code, text = said(lint, path, f"PYTHON_DIGEST={DIGEST}", f"GPU_DIGEST={DIGEST}")
    assert code == 1
    assert says in text
    assert re.search(rf"{path}:\d+: ", text)


def test_both_targets_end_alike() -> None:
    """Who runs it, where it may write and what it starts: the chart tells them apart by nothing but the name."""
    cpu, gpu = (TEXT.split(f" AS {name}\n")[1].split("\nFROM")[0] for name in ("cpu", "gpu"))
    for line in (
        "USER 1000:1000",
        "WORKDIR /tmp",
        'ENTRYPOINT ["python", "-m", "entrypoint"]',
        "HOME=/tmp",
        "USER=trainer",
    ):
        assert line in cpu
        assert line in gpu


def test_what_is_copied_is_let_in_and_nothing_else() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.M) for word in line.split()]
    for source in sources:
        assert (ROOT / source).exists()
        assert any(f"{source}/".startswith(f"{name}/") or name.startswith(f"{source}/") for name in let_in), source
    assert [name for name in let_in if not any(f"{name}/".startswith(f"{source}/") for source in sources)] == []
