"""README, environment.yml, pyproject.toml, CI, the citation and the wheel say the same."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LEARN = 'pip install torch==2.13.0 -e ".[lab]" && jupyter lab notebooks/00_start_here.ipynb'
CHECK = 'pip install torch==2.13.0 -e ".[test]" && pytest --nbval'


def blocks():
    return [block.strip() for block in re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)]


def requirements(extra=None):
    project = PROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {Requirement(line).name: Requirement(line) for line in lines}


def tracked(*paths):
    if not (ROOT / ".git").exists():
        pytest.skip("git says which files belong to the repository, and this copy is no git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [entry for entry in listed.stdout.split("\0") if entry and (ROOT / entry).exists()]


def test_the_readme_opens_with_the_two_commands():
    assert blocks()[:2] == [LEARN, CHECK]


def test_ci_runs_the_readmes_check_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m 1 '([^']+)' README.md", script)[1]
    assert [line for line in README.splitlines() if re.search(pattern, line)] == [CHECK]


def test_the_workflow_runs_ci_and_installs_as_the_readme_does():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"].values()
    commands = [[step["run"] for step in job["steps"] if "run" in step] for job in jobs]
    install = CHECK.split(" &&")[0].replace("[test]", "[test,ci]")
    assert commands == [[".ci/run"], [install, ".ci/run --quick"], [".ci/versions ${{ matrix.versions }}"]]
    assert [job["timeout-minutes"] for job in jobs] == [90, 90, 90]
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    pythons = workflow["jobs"]["quick"]["strategy"]["matrix"]["python-version"]
    every = ["3.11", *pythons]
    assert [version for version in [*every, "3.14"] if allowed.contains(version)] == every
    ends = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert [(end["versions"], end["python-version"]) for end in ends] == [
        ("oldest", every[0]),
        ("newest", every[-1]),
    ]


def test_the_hooks_are_the_tools_of_ci():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (repository,) = yaml.safe_load(text)["repos"]
    assert repository["repo"] == "local"  # so that nothing is downloaded
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for hook in repository["hooks"]:
        command = hook["entry"].split(" --force-exclude")[0]
        assert command.split()[0] in requirements("ci")
        assert re.search(rf"^\s*{command}( --check)?$", script, re.MULTILINE), command


def test_the_citation_is_of_this_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PROJECT["project"]
    for key in ("version", "license", "authors"):
        assert citation[key] == project[key]
    changes = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([\w.]+)\]", changes, re.MULTILINE)[1] == citation["version"]


def test_the_commands_fit_the_project():
    for command in (LEARN, CHECK):
        pins, extra = re.search(r'pip install (.*?) -e "\.\[(\w+)\]"', command).groups()
        assert extra in PROJECT["project"]["optional-dependencies"]
        for pin in map(Requirement, pins.split()):
            version = str(pin.specifier).removeprefix("==")
            assert requirements()[pin.name].specifier.contains(version)
    assert (ROOT / "notebooks" / "00_start_here.ipynb").exists()


def test_the_conda_environment_has_the_readmes_pins():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    *packages, last = conda["dependencies"]
    assert "pip" in packages
    assert f"pip install {' '.join(last['pip'])}" == LEARN.split(" &&")[0].replace('"', "")
    python = next(line for line in packages if line.startswith("python=")).removeprefix("python=")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(f"{python}.1")


# What Colab had on COLAB_READ: the list of its packages (googlecolab/backend-info, as another repository keeps it), and
# torch, which that list lacks, as a Colab session of 2026-10-06 printed it.
COLAB_READ = "2026-10-09"
COLAB = {
    "torch": "2.11.0",
    "transformers": "5.18.0",
    "datasets": "4.8.5",
    "pyarrow": "23.0.1",
    "safetensors": "0.8.0",
    "numpy": "2.1.3",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "tqdm": "4.67.3",
}


def test_ranges_not_pins_and_nothing_that_colab_would_have_to_replace():
    for extra in (None, *PROJECT["project"]["optional-dependencies"]):
        assert not [r for r in requirements(extra).values() if "==" in str(r.specifier)]
    assert set(COLAB) == set(requirements())
    for package, version in COLAB.items():
        assert requirements()[package].specifier.contains(version), package
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains("3.13.16")
    assert "peft" not in requirements()
    assert requirements("lab")["peft"].specifier.contains("0.21.1")  # lessons compare with it


def test_the_readme_says_what_colab_has_and_when():
    said = README.partition("## Colab")[2].partition("\n## ")[0]
    assert f"On {COLAB_READ}," in said
    named = ("torch", "transformers", "datasets", "numpy", "matplotlib", "ipywidgets")
    assert [package for package in named if f"{package} {COLAB[package]}" not in said] == []


@pytest.fixture(scope="module")
def lower_bounds():
    spec = importlib.util.spec_from_file_location("lower_bounds", ROOT / ".ci" / "lower_bounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "constraint"),
    [
        ("torch>=2.11", "torch==2.11"),
        ("jupyterlab<5,>=4.4", "jupyterlab==4.4"),
        ("torch>=2.9,>=2.10", "torch==2.10"),
        ("gguf[cli]~=0.17.1", "gguf==0.17.1"),
        ("numpy>=2.1; python_version < '3.13'", 'numpy==2.1 ; python_version < "3.13"'),
    ],
)
def test_the_lowest_version_is_read_from_the_requirement(lower_bounds, line, constraint):
    assert lower_bounds.lowest(Requirement(line)) == constraint


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch>2.11", "torch>=2.11,!=2.11", "torch>=2.11,<2"])
def test_a_requirement_without_a_lowest_version_is_refused(lower_bounds, line):
    with pytest.raises(ValueError, match="names no lowest version"):
        lower_bounds.lowest(Requirement(line))


def test_the_oldest_environment_pins_what_pyproject_names_and_nothing_else():
    printed = subprocess.run(
        [sys.executable, ".ci/lower_bounds.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    pins = {pin.name: str(pin.specifier) for pin in map(Requirement, printed.splitlines())}
    wanted = requirements() | requirements("test")
    assert pins == {name: str(one.specifier).replace(">=", "==") for name, one in wanted.items()}


@pytest.mark.parametrize("arguments", [[], ["middle"], ["oldest", "--python"]])
def test_versions_says_how_it_is_called(arguments):
    done = subprocess.run(
        ["bash", ".ci/versions", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: .ci/versions oldest|newest")


def test_the_series_links_every_lesson_and_nothing_else():
    linked = set(re.findall(r"\]\(notebooks/([\w.]+\.ipynb)\)", README))
    assert linked == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_series_gives_the_minutes_of_each_lesson():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        rows = [line for line in README.splitlines() if line.startswith("| ")]
        row = next(line for line in rows if f"notebooks/{path.name}" in line)
        minutes = row.rstrip("| ").rsplit("|", 1)[1].strip()
        assert minutes.isdigit()
        assert re.search(rf"\b{minutes}\s+min", path.read_text(encoding="utf-8")), (
            f"{path.name}: {minutes} minutes?"
        )


def test_the_method_table_has_every_method():
    import pefttutor

    rows = re.findall(r"^\| `(\w+)` \| \[([\w/.]+)\]\(\2\) \| (\d\d[a-z]?) \| \S", README, re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(pefttutor.methods())
    for method, file, lesson in rows:
        assert pefttutor.methods()[method].__module__ == file.removesuffix(".py").replace("/", ".")
        (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
        assert re.search(rf"\b{method}\b", path.read_text(encoding="utf-8")), (
            f"{lesson} doesn't name {method}"
        )


def test_the_readmes_example_runs():
    (example,) = [block for block in blocks() if block.startswith("import pefttutor")]
    names = {}
    exec(example.replace("steps=100", "steps=2"), names)
    assert len(names["history"].loss) == 2


@pytest.mark.parametrize("file", ["README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md"])
def test_links_lead_somewhere(file):
    targets = re.findall(r"\]\(([^)#\s]+)\)", (ROOT / file).read_text(encoding="utf-8"))
    folder = (ROOT / file).parent
    assert [target for target in targets if ":" not in target and not (folder / target).exists()] == []


def test_the_top_level_holds_what_it_should():
    allowed = {"LICENSE", "README.md", "conftest.py", "data", "environment.yml", "notebooks"}
    allowed |= {"pefttutor", "pyproject.toml", "tests"}
    allowed |= {"CITATION.cff"}  # read from the top level only; what else is for contributors lies in .github
    top = {entry.split("/")[0] for entry in tracked()}
    assert {entry for entry in top if not entry.startswith(".")} == allowed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_the_wheel_carries_the_data_and_the_package_only(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"pefttutor"}
    data = [entry.replace("data/", "pefttutor/embedded/", 1) for entry in tracked("data")]
    assert sorted(set(data) - set(names)) == []
    assert any(name.endswith("model.safetensors") for name in data)
    assert sorted(set(tracked("pefttutor")) - set(names)) == []


def test_an_installed_wheel_finds_its_models_and_tasks(wheel, tmp_path):
    """From an unpacked wheel, far from the repository."""
    wheel.extractall(tmp_path / "site")
    program = (
        "import pefttutor as p; model, _ = p.models.load('campus-nano'); task = p.data.load(p.data.names()[0]); "
        "print(p.__file__, model.num_parameters() > 0, len(task['test']) > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "pefttutor" / "__init__.py"), "True", "True"], (
        done.stderr
    )
