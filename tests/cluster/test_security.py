"""What a run's account may do, and what a namespace that enforces `restricted` admits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.cluster.api import Api
from tests.cluster.plane import Plane, until
from tests.cluster.platform import SLEEP, Platform, asleep, instead_of_training

VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
# What every account may do, by roles that Kubernetes itself binds: ask about itself.
EVERYBODY = {
    "selfsubjectaccessreviews.authorization.k8s.io",
    "selfsubjectrulesreviews.authorization.k8s.io",
    "selfsubjectreviews.authentication.k8s.io",
}


def test_the_trainers_account_may_do_nothing_once_it_runs(platform: Platform) -> None:
    release = platform.release("account", **instead_of_training(platform, "account", SLEEP))
    with release.installed():
        until(partial(asleep, release), 180, "the gang runs")
        assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in release.pods)
        token = account_token(platform.plane, platform.namespace, "account")
        assert allowed(platform.plane.api.with_token(token), platform.namespace) == set()


def test_the_watchers_account_may_do_what_it_needs_and_nothing_else(platform: Platform) -> None:
    """Its rights are those of one release: one Job, one ConfigMap, and what has no name before it is created."""
    unchecked = {"enabled": False}
    node_class = {"name": "never-there"}
    release = platform.release("watched", preflight={"checks": []}, clusterChecks=unchecked, nodeClass=node_class)
    with release.installed():
        token = account_token(platform.plane, platform.namespace, "watched-gang")
        account = platform.plane.api.with_token(token)
        everywhere = {"create commands.bus.volcano.sh", "create events."}
        assert allowed(account, platform.namespace) == everywhere
        assert allowed(account, platform.namespace, "watched") == {*everywhere, "get jobs.batch.volcano.sh"}
        own = {"get configmaps.", "patch configmaps."}
        assert allowed(account, platform.namespace, "watched-gang") == everywhere | own
        assert allowed(account, "default") == set()


def account_token(plane: Plane, namespace: str, account: str) -> str:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    made = plane.api.create("serviceaccounts", request, namespace, sub=(account, "token"))
    return str(made["status"]["token"])


def allowed(account: Api, namespace: str, object_name: str = "") -> set[str]:
    """`verb resource` of everything that the account may do in the namespace, but ask about itself.

    With `object_name`, what it may do with an object of that name; without, with any.
    """
    resources = [""] + [group["name"] for group in account.request("GET", "/apis")["groups"]]
    asked = [
        (verb, name, group)
        for group in resources
        for name in names(account, group)
        if f"{name}.{group}" not in EVERYBODY
        for verb in VERBS
    ]

    def allows(question: tuple[str, str, str]) -> bool:
        verb, name, group = question
        return may(account, verb, group, name, object_name, namespace)

    assert len(asked) > 500
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(allows, asked))
    return {f"{verb} {name}.{group}" for (verb, name, group), yes in zip(asked, answers, strict=True) if yes}


def may(account: Api, verb: str, group: str, resource: str, name: str, namespace: str = "") -> bool:
    """Whether the account may do it to the object of this name; empty: to any. `resource` may name a subresource."""
    resource, _, subresource = resource.partition("/")
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {**asked, "name": name, "namespace": namespace}},
    }
    answer = account.create("selfsubjectaccessreviews.authorization.k8s.io", review)
    return bool(answer["status"]["allowed"])


def names(api: Api, group: str) -> list[str]:
    """Resources and subresources of an API group's preferred version."""
    version = api.request("GET", f"/apis/{group}")["preferredVersion"]["groupVersion"] if group else ""
    listed = api.request("GET", f"/apis/{version}" if group else "/api/v1")["resources"]
    return [str(resource["name"]) for resource in listed]
