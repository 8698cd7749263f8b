"""The part of the shim for Flower's private API that concerns the SuperLink's control API: its nodes and runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto import control_pb2


@dataclass(frozen=True)
class NodeState:
    """A node that the SuperLink knows. `status` is registered, online, offline or unregistered; times are ISO 8601."""

    node_id: int
    name: str
    status: str
    public_key: bytes
    last_activated_at: str
    last_deactivated_at: str


class ControlError(RuntimeError):
    """The SuperLink refuses a request, or does not answer."""


class SuperLink:
    """The control API of the SuperLink at `address`, with the `certificates` of its authority as PEM."""

    def __init__(self, address: str, certificates: bytes) -> None:
        self._address, self._certificates = address, certificates
        self._open: Any = None

    def nodes(self) -> list[NodeState]:
        """Return all nodes that were ever registered."""
        answer = self._call("ListNodes", control_pb2.ListNodesRequest())
        return [
            NodeState(
                node.node_id, node.name, node.status, node.public_key,
                node.last_activated_at or "", node.last_deactivated_at or "",
            )
            for node in answer.nodes_info
        ]  # fmt: skip

    def register(self, public_key: bytes, name: str) -> None:
        """Register a node's key, as `key_bytes` returns it, under a name."""
        self._call("RegisterNode", control_pb2.RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node_id: int) -> None:
        """Unregister a node. Its key can never be registered again."""
        self._call("UnregisterNode", control_pb2.UnregisterNodeRequest(node_id=node_id))

    def run_statuses(self) -> dict[int, str]:
        """Return the status of each run, such as running or finished:completed."""
        answer = self._call("ListRuns", control_pb2.ListRunsRequest())
        return {
            int(run_id): ":".join(part for part in (run.status.status, run.status.sub_status) if part)
            for run_id, run in answer.run_dict.items()
        }

    def _call(self, name: str, request: Any) -> Any:
        try:
            return getattr(self._client(), name)(request)
        except Exception as error:  # httpx's errors and Flower's own
            self._open = None
            raise ControlError(f"The SuperLink at {self._address} does not do {name}: {error}") from error

    def _client(self) -> Any:
        if self._open is None:
            interceptors = import_module("flwr.supercore.interceptors")
            client = import_module("flwr.supercore.control").ControlHttpClient
            self._open = client.from_server_address(
                server_address=self._address,
                insecure=False,
                root_certificates=self._certificates,
                interceptors=[interceptors.RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )
        return self._open


def key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as Flower stores it."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
