"""What a kubelet says of the resources that it has allocated: v1.PodResourcesLister of k8s.io/kubelet.

Spoken over gRPC. CPUs, memory and topology are in these messages, too, and not declared: nobody asks here.
"""

from __future__ import annotations

from rpc.codec import Message, message, messages, string, strings

_PACKAGE = "v1."
SERVICE = "v1.PodResourcesLister"
GET = f"/{SERVICE}/Get"
LIST = f"/{SERVICE}/List"


class CDIDevice(Message, name=_PACKAGE + "CDIDevice"):
    """name: qualified, VENDOR/CLASS=NAME."""

    name: str = string(1)


class ClaimResource(Message, name=_PACKAGE + "ClaimResource"):
    cdi_devices: list[CDIDevice] = messages(1, CDIDevice)
    driver_name: str = string(2)
    pool_name: str = string(3)
    device_name: str = string(4)


class DynamicResource(Message, name=_PACKAGE + "DynamicResource"):
    """Of a ResourceClaim (dynamic resource allocation)."""

    claim_name: str = string(2)
    claim_namespace: str = string(3)
    claim_resources: list[ClaimResource] = messages(4, ClaimResource)


class ContainerDevices(Message, name=_PACKAGE + "ContainerDevices"):
    """Of a device plugin. device_ids: whatever the plugin calls its devices."""

    resource_name: str = string(1)
    device_ids: list[str] = strings(2)


class ContainerResources(Message, name=_PACKAGE + "ContainerResources"):
    name: str = string(1)
    devices: list[ContainerDevices] = messages(2, ContainerDevices)
    dynamic_resources: list[DynamicResource] = messages(5, DynamicResource)


class PodResources(Message, name=_PACKAGE + "PodResources"):
    """containers: those of the pod's spec, and init containers that go on beside them."""

    name: str = string(1)
    namespace: str = string(2)
    containers: list[ContainerResources] = messages(3, ContainerResources)


class GetPodResourcesRequest(Message, name=_PACKAGE + "GetPodResourcesRequest"):
    """Answered since Kubernetes 1.34, or 1.27 with the feature gate KubeletPodResourcesGet."""

    pod_name: str = string(1)
    pod_namespace: str = string(2)


class GetPodResourcesResponse(Message, name=_PACKAGE + "GetPodResourcesResponse"):
    pod_resources: PodResources | None = message(1, PodResources)


class ListPodResourcesRequest(Message, name=_PACKAGE + "ListPodResourcesRequest"):
    pass


class ListPodResourcesResponse(Message, name=_PACKAGE + "ListPodResourcesResponse"):
    pod_resources: list[PodResources] = messages(1, PodResources)
