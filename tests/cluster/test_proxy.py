"""The proxy in front of the server: its limits fit the recipe, its pods and the policies that make it the only door."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml
from manifests import ROOT, Document, named, of_kind, other_pods, pods

from af2_ray.config import Serve, load_recipe

FOLDER = ROOT / "cluster" / "base" / "proxy"
START = (FOLDER / "start.sh").read_text()
DEFAULTS = dict(re.findall(r'^: "\$\{AF2_PROXY_(\w+):=([^}]*)\}"', START, re.MULTILINE))
ANSWER_MB = 16  # proxy_max_temp_file_size
Labels = dict[str, str]


@dataclass(frozen=True)
class Caller:
    """A pod somewhere in the cluster, by its labels and those of its namespace."""

    namespace: str
    pod: Labels = field(default_factory=dict)
    namespace_labels: Labels = field(default_factory=dict)


OPERATOR = Caller("ray-system", {"app.kubernetes.io/name": "kuberay-operator"})
CUSTOMER = Caller("shop", {"app": "shop"}, {"af2.ray/clients": "yes"})
STRANGERS = [
    Caller("elsewhere"),
    Caller("af2", {"app": "something-else"}),
    Caller("monitoring", {}, {"kubernetes.io/metadata.name": "monitoring"}),
    *(Caller("af2", {"app.kubernetes.io/name": name}) for name in ("af2-mlflow", "af2-mlflow-db", "af2-redis")),
]


def fits(selector: Document | None, labels: Labels) -> bool:
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: Document, caller: Caller) -> bool:
    """Whether a policy's `from` means a caller; without a namespace selector it means pods of the policy's own one."""
    namespace = peer.get("namespaceSelector")
    near = fits(namespace, caller.namespace_labels) if namespace is not None else caller.namespace == "af2"
    return near and fits(peer.get("podSelector", {}), caller.pod)


def reaches(documents: list[Document], caller: Caller, pod: Document, port: int) -> bool:
    """Whether the policies let a caller connect to a port of a pod."""
    named_ports = {each.get("name"): each["containerPort"] for each in ports_of(pod)}
    policies = [each["spec"] for each in of_kind(documents, "NetworkPolicy")]
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress"]
        if not fits(policy["podSelector"], pod["metadata"]["labels"]):
            continue
        for rule in policy.get("ingress", []):
            opened = [named_ports.get(each["port"], each["port"]) for each in rule.get("ports", [])]
            if (not opened or port in opened) and any(is_peer(peer, caller) for peer in rule["from"]):
                return True
    return not any(fits(policy["podSelector"], pod["metadata"]["labels"]) for policy in policies)


def ports_of(pod: Document) -> list[Document]:
    return [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]


def proxy_pod(documents: list[Document]) -> Document:
    return named(documents, "Deployment", "af2-api")["spec"]["template"]


def values(documents: list[Document]) -> dict[str, str]:
    """The values that the pod starts with, without `AF2_PROXY_`."""
    (container,) = proxy_pod(documents)["spec"]["containers"]
    said = {each["name"].removeprefix("AF2_PROXY_"): each["value"] for each in container["env"]}
    assert said.keys() <= DEFAULTS.keys() | {"FOLDER"}, "a variable that start.sh does not know"
    return DEFAULTS | said


# --- Who reaches what ------------------------------------------------------------------------------------------------


def test_only_the_proxy_and_the_operator_reach_the_server(rendered: list[Document]) -> None:
    proxy = Caller("af2", proxy_pod(rendered)["metadata"]["labels"])
    for pod in pods(rendered):
        assert reaches(rendered, proxy, pod, 8000)
        assert reaches(rendered, OPERATOR, pod, 8000)
        assert [caller for caller in (CUSTOMER, *STRANGERS) if reaches(rendered, caller, pod, 8000)] == []
        assert not reaches(rendered, proxy, pod, 8265), "the dashboard runs any code"


def test_customers_reach_the_proxy_and_nothing_else(rendered: list[Document]) -> None:
    reached = {
        (pod["metadata"]["labels"]["app.kubernetes.io/name"], port["containerPort"])
        for pod in (*pods(rendered), *other_pods(rendered))
        for port in ports_of(pod)
        if reaches(rendered, CUSTOMER, pod, port["containerPort"])
    }
    assert reached == {("af2-api", 8080)}


def test_nobody_else_reaches_the_proxy(rendered: list[Document]) -> None:
    pod = proxy_pod(rendered)
    assert not [
        caller for caller in (OPERATOR, *STRANGERS) for port in (8080, 8081) if reaches(rendered, caller, pod, port)
    ]


def test_the_policies_are_read_as_kubernetes_reads_them(rendered: list[Document]) -> None:
    """A pod that no policy selects is open; one of another namespace is not meant by a bare pod selector."""
    open_pod = {"metadata": {"labels": {}}, "spec": {"containers": []}}
    without = [each for each in rendered if each["kind"] != "NetworkPolicy"]
    assert reaches(without, STRANGERS[0], open_pod, 1)
    assert not reaches(rendered, STRANGERS[0], open_pod, 1)
    (redis,) = [
        pod for pod in other_pods(rendered) if pod["metadata"]["labels"]["app.kubernetes.io/name"] == "af2-redis"
    ]
    ray = next(pods(rendered))["metadata"]["labels"]
    assert reaches(rendered, Caller("af2", ray), redis, 6379)
    assert not reaches(rendered, Caller("elsewhere", ray), redis, 6379)


# --- What the pod is -------------------------------------------------------------------------------------------------


def test_the_pod_runs_the_files_that_the_tests_run(rendered: list[Document]) -> None:
    pod = proxy_pod(rendered)["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    found = named(rendered, "ConfigMap", volumes["configuration"]["configMap"]["name"])
    assert found["data"] == {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert re.fullmatch(r"af2-api-nginx-\w+", found["metadata"]["name"]), "a change of it changes the pod"
    assert container["command"] == ["sh", f"{mounts['configuration']}/start.sh"]
    assert values(rendered)["FOLDER"] == mounts["bodies"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not pod["automountServiceAccountToken"]


def test_start_fills_in_every_word(rendered: list[Document]) -> None:
    words = set(re.findall(r"@([A-Z_]+)@", (FOLDER / "nginx.conf").read_text())) - {"WORDS"}
    assert words == DEFAULTS.keys() == set(re.findall(r"s\|@([A-Z_]+)@\|", START))
    assert values(rendered).keys() == words | {"FOLDER"}


def test_limits_fit_the_recipe(rendered: list[Document]) -> None:
    settings = named(rendered, "ConfigMap", "af2-settings")["data"]
    deployed = load_recipe(settings["AF2_RECIPE"]).serve
    given = values(rendered)
    for serve in (deployed, Serve()):
        assert int(given["BODY_MB"]) == serve.max_body_mb
        assert int(given["ANSWER_S"]) > serve.request_timeout_s


def test_all_requests_at_their_largest_have_room_on_the_disk(rendered: list[Document]) -> None:
    """A pod that fills more than its volume is evicted, with all that is on its way."""
    given = values(rendered)
    assert f"proxy_max_temp_file_size {ANSWER_MB}m;" in (FOLDER / "nginx.conf").read_text()
    (volume,) = [each["emptyDir"] for each in proxy_pod(rendered)["spec"]["volumes"] if "emptyDir" in each]
    most_mb = int(given["REQUESTS"]) * (int(given["BODY_MB"]) + ANSWER_MB)
    assert most_mb <= 1024 * int(volume["sizeLimit"].removesuffix("Gi"))


def test_ports_and_names_meet(rendered: list[Document]) -> None:
    given, pod = values(rendered), proxy_pod(rendered)
    ports = {port["name"]: port["containerPort"] for port in ports_of(pod)}
    assert {"http": given["LISTEN"], "live": given["LIVE"]} == {name: f"0.0.0.0:{port}" for name, port in ports.items()}
    service = named(rendered, "Service", "af2-api")["spec"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(80, "http")]
    ray = named(rendered, "RayService", "af2-serve")
    listens_on = yaml.safe_load(ray["spec"]["serveConfigV2"])["http_options"]["port"]
    assert given["UPSTREAM"] == f"{ray['metadata']['name']}-serve-svc:{listens_on}", "as KubeRay names it"


def test_one_pod_may_go_and_finishes_its_answers(rendered: list[Document]) -> None:
    deployment = named(rendered, "Deployment", "af2-api")
    budget = named(rendered, "PodDisruptionBudget", "af2-api")["spec"]
    assert deployment["spec"]["replicas"] - budget["maxUnavailable"] >= 1
    assert budget["selector"] == deployment["spec"]["selector"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (waits_s,) = map(int, re.findall(r"worker_shutdown_timeout (\d+)s", (FOLDER / "nginx.conf").read_text()))
    asleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits_s + asleep_s
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/live", "port": "live"}, (
            "not the server's: it may be restarting"
        )
