"""Which workers may form a pair, and why some must not."""

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_runtime.layouts import layout_mismatch, layout_text, model_mismatch


def is_pair(a: discovery.Instance, b: discovery.Instance) -> bool:
    """Whether the two should know each other: other instances, the same model by weights or by name.

    Whatever their work: a prefill hands over to a decode, and any two may fetch from each other's prefix cache.
    """
    if (a.service, a.instance_id) == (b.service, b.instance_id):
        return False
    # The same name over other weights is a mistake somebody must be told about; other models have nothing to do with each other.
    return a.model.fingerprint == b.model.fingerprint or a.model.served_name == b.model.served_name


def refusal(a: discovery.Instance, b: discovery.Instance) -> str:
    """Why this pair must not be formed, naming both sides' values; "" if it may be.

    Block sizes and numbers of shards may differ if one divides the other: blocks are cut anew on their way.
    """
    names = (a.instance_id, b.instance_id)
    differences = model_mismatch(a.model, b.model)
    if why := layout_mismatch(a.layout, b.layout):
        differences.append(f"{why}; {names[0]} has {layout_text(a.layout)}, {names[1]} has {layout_text(b.layout)}")
    if differences:
        return f"{names[0]} and {names[1]} cannot exchange KV: {'; '.join(differences)}"
    offered = [sorted({offer.name for offer in instance.transports}) for instance in (a, b)]
    if not set(offered[0]) & set(offered[1]):
        texts = [", ".join(transports) or "none" for transports in offered]
        return f"{names[0]} and {names[1]} cannot exchange KV: transports {texts[0]} against {texts[1]}"
    return ""
