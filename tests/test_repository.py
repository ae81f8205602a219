"""The repository itself: packaging, the README's claims, one version of the linter."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastlatent as fl

ROOT = Path(__file__).parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables_are_those_of_the_committed_results():
    readme = load(ROOT / "benchmarks" / "readme.py")
    text = (ROOT / "README.md").read_text()
    assert readme.render(text) == text
    assert "| fastlatent |" in text


def test_one_version_of_ruff():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [need for need in project["project"]["optional-dependencies"]["test"] if "ruff" in need]
    hook = re.search(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())[1]
    assert pins == [f"ruff=={hook}"]


def test_ci_runs_the_readme_command():
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- tests -->\n```bash\n(.*)\n```\n<!-- end -->", readme)[1]
    assert "README.md" in script and ".venv/bin/pytest" in block


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == fl.__version__


def test_public_names():
    assert set(fl.__all__) <= set(dir(fl))
    for name in fl.__all__:
        assert getattr(fl, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fl.nothing


def test_import_is_light():
    """Neither scikit-learn nor matplotlib, Triton or Numba come with the package itself."""
    program = (
        "import sys, fastlatent\n"
        "print([m for m in ('sklearn', 'matplotlib', 'triton', 'numba') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_wheel_holds_fastlatent_only(tmp_path):
    """The folder kernels/ must not become the top-level module that PyPI's kernels owns."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
            *("--quiet", "--wheel-dir", str(tmp_path), str(ROOT)),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fastlatent"}
    for needed in ("py.typed", "templates/report.html", "kernels/rules.py", "kernels/cpu/adam.py"):
        assert f"fastlatent/{needed}" in names
