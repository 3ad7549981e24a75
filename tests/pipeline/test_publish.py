"""Where a run publishes to, and as a user sees it: tokens, terms, collections, the command line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline import session
from pipeline.cli.main import main
from pipeline.collecting import collect
from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault
from pipeline.planning import plan as planning
from pipeline.planning.plan import Collection
from pipeline.zoo import zoo as zoos
from tests.pipeline.runs import MODELS, TEXT
from tests.workers.published import Faults, artifact
from workers.errors import HubRefused, ZooError
from workers.spec.job import Destination, HubLimits
from workers.transfer import destinations, hub
from workers.transfer.tokens import token_problem

REPO = "acme/model-bnb-nf4"

ZOO = """
name: small
models: [{{id: {model}}}]
recipes: [bnb-nf4]
verify: {{dataset: {{path: text, data_files: [{text}/heldout.txt]}}, tokens: 2048, sequence_length: 256}}
publish: {{namespace: acme, {publish}}}
"""


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def server(tmp_path: Path, faults: Faults) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", fault=faults) as server:
        yield server


def load(tmp_path: Path, publish: str) -> zoos.Zoo:
    path = tmp_path / "zoo.yaml"
    path.write_text(ZOO.format(model=MODELS / "llama-tiny", text=TEXT, publish=publish))
    return zoos.load(path)


# ------------------------------------------------------------------------------------------------- tokens


def user(role: str, org_role: str = "write", **more: Any) -> dict[str, Any]:
    """As /api/whoami-v2 answers."""
    return {
        "name": "Ann",
        "orgs": [{"name": "acme", "roleInOrg": org_role}],
        "auth": {"accessToken": {"role": role, **more}},
    }


def fine(*scoped: tuple[str, str, list[str]], everywhere: tuple[str, ...] = ()) -> dict[str, Any]:
    grants = [{"entity": {"type": kind, "name": name}, "permissions": may} for kind, name, may in scoped]
    return {"fineGrained": {"global": list(everywhere), "scoped": grants}}


@pytest.mark.parametrize(
    ("who", "namespace", "said"),
    [
        (user("write"), "acme", None),
        (user("write"), "ann", None),
        (user("write"), "other", "got 'other', but the token can write to Ann, acme at most"),
        (user("read"), "Ann", "may only read; set HF_TOKEN"),
        (user("write", "read"), "acme", "'Ann' may only read in the organisation 'acme'"),
        (user("write", "contributor"), "acme", None),
        (user("fineGrained", **fine()), "Ann", "lacks repo.write for 'Ann'"),
        (user("fineGrained", **fine(("user", "Ann", ["repo.content.read"]))), "Ann", "lacks repo.write for 'Ann'"),
        (user("fineGrained", **fine(("user", "Ann", ["repo.write"]))), "Ann", None),
        (user("fineGrained", **fine(("user", "Ann", ["repo.write"]))), "acme", "lacks repo.write for 'acme'"),
        (user("fineGrained", **fine(("org", "acme", ["repo.write"]))), "acme", None),
        (user("fineGrained", **fine(("model", "acme/one", ["repo.write"]))), "acme", None),
        (user("fineGrained", **fine(everywhere=("repo.write",))), "acme", None),
        ({"name": "loopback"}, None, None),
    ],
)
def test_a_token_that_may_not_write_there_is_known_by_its_grants(
    who: dict[str, Any], namespace: str | None, said: str | None
) -> None:
    problem = token_problem(who, namespace, members_only=True)
    assert (said is None) is (problem is None), problem
    assert said is None or said in (problem or "")


def test_a_hub_of_ones_own_lets_write_to_namespaces_that_whoami_does_not_list() -> None:
    assert token_problem(user("write"), "other", members_only=False) is None


# ------------------------------------------------------------------------------------- the zoo's own terms


def test_what_a_zoo_says_reaches_the_worker(tmp_path: Path, server: LoopbackHub) -> None:
    said = (
        f"endpoint: '{server.endpoint}', private: false, gated: auto, keep: 3, force: true, "
        "collection: Nightly, limits: {requests: 7}"
    )
    zoo = load(tmp_path, said)
    with session.destination(zoo, tmp_path / "runs") as endpoint:
        made = planning.make_plan(zoo, tmp_path, tmp_path / "runs", endpoint)
    assert made.jobs[0].destination == Destination(
        endpoint=server.endpoint, private=False, gated="auto", keep=3, force=True, limits=HubLimits(requests=7)
    )
    assert made.collection == Collection("Nightly", "acme", server.endpoint, private=False)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("endpoint: models/here", "no URL, absolute path or 'loopback'"),
        ("endpoint: 'https://ann:hf_secret@hub.example'", "holds credentials"),
        ("endpoint: /models, gated: auto", "gated: a folder has none"),
        ("endpoint: 's3://models', collection: Nightly", "collection: a folder has none"),
        ("gated: maybe", "gated"),
        ("keep: 0", "keep"),
    ],
)
def test_terms_that_can_not_hold_are_refused(tmp_path: Path, said: str, problem: str) -> None:
    with pytest.raises(ZooError, match=problem) as caught:
        load(tmp_path, said)
    assert "hf_secret" not in str(caught.value)


def test_what_stands_in_a_folder_is_not_made_again(tmp_path: Path) -> None:
    root = str(tmp_path / "out")
    zoo = load(tmp_path, f"endpoint: {root}")

    def cell() -> planning.PlannedArtifact:
        with session.destination(zoo, tmp_path / "runs") as endpoint:
            assert endpoint == root
            return planning.make_plan(zoo, tmp_path, tmp_path / "runs", endpoint).artifacts[0]

    first = cell()
    assert not first.skipped
    assert not (tmp_path / "out").exists(), "planning writes nothing"
    order = first.order
    made = artifact(tmp_path / "a", fingerprint=order.fingerprint)
    assert order.repo_id == "acme/llama-tiny-bnb-nf4"
    revision = destinations.publish(Destination(endpoint=root), order.repo_id, made)
    again = cell()
    assert again.skipped
    assert again.commit == revision
    (tmp_path / "out" / order.repo_id / revision / "config.json").unlink()
    assert not cell().skipped, "what isn't whole any more doesn't stand"


@pytest.mark.parametrize("place", ["memory://", "file:///models/"])
def test_addresses_keep_what_makes_them_one(tmp_path: Path, place: str) -> None:
    with session.destination(load(tmp_path, f"endpoint: '{place}'"), tmp_path) as endpoint:
        assert endpoint == {"memory://": "memory://", "file:///models/": "file:///models"}[place]


# -------------------------------------------------------------------------------------------- collections


def test_a_collection_is_made_once_and_holds_what_stands(server: LoopbackHub, faults: Faults) -> None:
    api = hub.connect(server.endpoint)
    for name in ("one", "two"):
        api.create_repo(f"acme/{name}")
    wanted = Collection("Nightly", "acme", server.endpoint, private=True)
    faults.plan = [("/api/collections", 1, Fault(status=503)), ("/items", 1, Fault(drop="after"))]
    assert collect(wanted, ["acme/one"]) is None
    assert collect(wanted, ["acme/two", "acme/one"]) is None
    assert collect(wanted, ["acme/two"]) is None
    (found,) = api.list_collections(owner="acme")
    assert found.private
    assert [item.item_id for item in api.get_collection(found.slug).items] == ["acme/one", "acme/two"]


def test_a_collection_that_fails_is_told_and_nothing_more(server: LoopbackHub) -> None:
    problem = collect(Collection("Nightly", "acme", server.endpoint, private=True), ["acme/nothing"])
    assert problem is not None
    assert problem.startswith("collection 'Nightly': put acme/nothing into")


def test_a_run_ends_with_its_collection(tmp_path: Path, server: LoopbackHub) -> None:
    """All artifacts stand: the run has nothing to do but that."""
    zoo = load(tmp_path, f"endpoint: '{server.endpoint}', collection: Nightly")
    out = tmp_path / "runs"
    order = planning.make_plan(zoo, tmp_path, out, server.endpoint).artifacts[0].order
    assert order.repo_id is not None
    made = artifact(tmp_path / "a", fingerprint=order.fingerprint)
    destinations.publish(Destination(endpoint=server.endpoint), order.repo_id, made)
    plan = planning.make_plan(zoo, tmp_path, out, server.endpoint)
    assert not plan.jobs
    finished = session.run(plan, out, None, [])
    assert finished.notices == ()
    (found,) = hub.connect(server.endpoint).list_collections(owner="acme")
    assert [item.item_id for item in found.items] == [order.repo_id]
    assert plan.collection is not None
    nowhere = replace(plan, collection=replace(plan.collection, namespace="no such namespace"))
    finished = session.run(nowhere, out, None, [])
    assert "collection 'Nightly'" in finished.notices[0]
    assert finished.results.status == "ok"


# ------------------------------------------------------------------------------------------- command line


def quantmill(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["publish", *map(str, arguments)])


def test_a_dry_run_tells_everything_and_writes_nothing(tmp_path: Path, server: LoopbackHub, faults: Faults) -> None:
    folder = artifact(tmp_path / "a")
    there = ("--to", REPO, "--endpoint", server.endpoint)
    told = quantmill(folder, *there, "--gated", "manual", "--public", "--dry-run")
    assert told.exit_code == 0, told.output
    lines = [line.strip() for line in told.output.splitlines()]
    assert lines[0] == f"{server.endpoint}/{REPO}: would change:"
    assert lines[1:3] == [f"create {REPO} (public)", "set gated to manual"]
    assert "upload model.safetensors (3,000 bytes)" in lines
    assert lines[-3] == "commit once"
    assert lines[-1] == "tag quantmill-ffffffffffff"
    assert {line.split()[0] for line in faults.seen} == {"GET"}
    assert not hub.connect(server.endpoint).repo_exists(REPO)


def test_publishing_by_hand(tmp_path: Path, server: LoopbackHub) -> None:
    folder = artifact(tmp_path / "a")
    there = ("--to", REPO, "--endpoint", server.endpoint)
    done = quantmill(folder, *there)
    assert done.exit_code == 0, done.output
    api = hub.connect(server.endpoint)
    commit = api.list_repo_commits(REPO)[0].commit_id
    assert done.output.splitlines()[-1] == f"{server.endpoint}/{REPO} at {commit}"
    assert quantmill(folder, *there, "--dry-run").output.strip().endswith("shows this artifact already")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    refused = quantmill(folder, *there)
    assert refused.exit_code == 2
    assert "notes.txt" in refused.output
    assert "delete notes.txt" in quantmill(folder, *there, "--force", "--dry-run").output
    assert quantmill(folder, *there, "--force").exit_code == 0
    assert "notes.txt" not in api.list_repo_files(REPO)


def test_publishing_into_a_folder_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = artifact(tmp_path / "a")
    told = quantmill(folder, "--to", REPO, "--endpoint", "models", "--dry-run")
    assert "point main.json to quantmill-ffffffffffff" in told.output
    assert not (tmp_path / "models").exists()
    assert quantmill(folder, "--to", REPO, "--endpoint", "models").exit_code == 0
    assert json.loads((tmp_path / "models" / REPO / "main.json").read_text())["revision"] == "quantmill-ffffffffffff"


@pytest.mark.parametrize("name", ["acme", "acme/", "/x", "a/b/c"])
def test_a_name_without_a_namespace_is_refused(tmp_path: Path, name: str) -> None:
    refused = quantmill(artifact(tmp_path / "a"), "--to", name, "--endpoint", str(tmp_path / "out"))
    assert refused.exit_code == 2
    assert "expected NAMESPACE/NAME" in refused.output


def test_a_rejected_artifact_is_refused_before_the_hub_is_asked(tmp_path: Path, faults: Faults) -> None:
    folder = artifact(tmp_path / "a", accepted=False)
    refused = quantmill(folder, "--to", REPO, "--endpoint", "http://127.0.0.1:9")
    assert refused.exit_code == 2
    assert "was rejected (KL too high)" in refused.output


def test_a_folder_that_can_not_be_written_is_found_in_preflight(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubRefused, match="no folder that this user may write to"):
        destinations.check(str(tmp_path / "file" / "models"), "acme")
