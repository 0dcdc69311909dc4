"""What rpc/api declares is what containerd declares: every name, number, type and label of every field,
and every method, compared with the descriptors in containerd's own Go packages.
"""

import importlib
import pkgutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

import rpc.api
from rpc import ttrpc
from rpc.api import task
from rpc.codec import Field, Message
from rpc.method import Method

_FIELD = descriptor_pb2.FieldDescriptorProto
# Our own protocol, and the kubelet's, of which tests/kubernetes/test_devices.py asks a real one.
NOT_CONTAINERDS = {"agent", "podresources"}
MODULES: list[Any] = [ttrpc] + [
    importlib.import_module(f"rpc.api.{module.name}")
    for module in pkgutil.iter_modules(rpc.api.__path__)
    if module.name not in NOT_CONTAINERDS
]
MESSAGES: dict[str, type[Message]] = {
    value.NAME: value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Message) and "." in value.NAME
}
METHODS: list[Method[Any, Any]] = [method for module in MODULES for method in getattr(module, "METHODS", ())]

# Left out on purpose: nothing of ours reads or writes it.
LEFT_OUT = {"containerd.events.TaskCheckpointed"}


class Theirs:
    """containerd's messages and services by their full names."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self.messages: dict[str, descriptor_pb2.DescriptorProto] = {}
        self.methods: dict[str, descriptor_pb2.MethodDescriptorProto] = {}
        for file in files.file:
            for message in file.message_type:
                self._add(file.package, message)
            for service in file.service:
                for method in service.method:
                    self.methods[f"{file.package}.{service.name}/{method.name}"] = method

    def _add(self, scope: str, message: descriptor_pb2.DescriptorProto) -> None:
        name = f"{scope}.{message.name}"
        self.messages[name] = message
        for nested in message.nested_type:
            self._add(name, nested)

    def shape(self, message: str) -> dict[str, tuple[object, ...]]:
        return {field.name: self._field(field) for field in self.messages[message].field}

    def _field(self, field: descriptor_pb2.FieldDescriptorProto) -> tuple[object, ...]:
        repeated = field.label == _FIELD.LABEL_REPEATED
        if field.type == _FIELD.TYPE_MESSAGE:
            entry = self.messages[field.type_name[1:]]
            if entry.options.map_entry:
                key, value = (self._field(part)[1:3] for part in entry.field)
                return field.number, *value, "map of", key[0], False
        kind = _FIELD.Type.Name(field.type).removeprefix("TYPE_").lower()
        name = field.type_name[1:] if field.type == _FIELD.TYPE_MESSAGE else ""
        return field.number, kind, name, "list of" if repeated else "one", "", field.proto3_optional


def ours(field: Field) -> tuple[object, ...]:
    kind = {"buffer": "bytes"}.get(field.kind, field.kind)
    name = field.message.NAME if field.message else ""
    number = "map of" if field.key else "list of" if field.repeated else "one"
    return field.number, kind, name, number, field.key, field.optional


@pytest.fixture(scope="module")
def theirs(go_program: Path) -> Theirs:
    described = subprocess.run([go_program, "describe"], check=True, capture_output=True).stdout
    return Theirs(descriptor_pb2.FileDescriptorSet.FromString(described))


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_a_message_is_declared_as_containerd_declares_it(theirs: Theirs, name: str) -> None:
    assert {field.name: ours(field) for field in MESSAGES[name].FIELDS} == theirs.shape(name)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_is_declared_as_containerd_declares_it(theirs: Theirs, method: Method[Any, Any]) -> None:
    declared = theirs.methods[repr(method)]
    assert (declared.input_type, declared.output_type) == (
        "." + method.request.NAME,
        "." + method.response.NAME,
    )
    assert (declared.client_streaming, declared.server_streaming) == (
        method.client_streams,
        method.server_streams,
    )


def test_task_v3_differs_from_v2_in_names_only(theirs: Theirs) -> None:
    for method in task.METHODS:
        third = theirs.methods[f"{task.SERVICE_V3}/{method.name}"]
        second = theirs.methods[repr(method)]
        for here, there in (
            (second.input_type, third.input_type),
            (second.output_type, third.output_type),
        ):
            assert here.replace(".v2.", ".v3.") == there
            assert theirs.shape(here[1:]) == theirs.shape(there[1:])


def test_every_method_of_the_services_we_serve_is_declared(theirs: Theirs) -> None:
    services = {method.service for method in METHODS}
    assert {repr(method) for method in METHODS} == {
        name for name in theirs.methods if name.partition("/")[0] in services
    }


def test_every_event_of_a_task_is_declared(theirs: Theirs) -> None:
    events = {name for name in theirs.messages if name.startswith("containerd.events.Task")}
    assert events - set(MESSAGES) == LEFT_OUT
