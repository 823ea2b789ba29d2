"""What a policy and its history have learnt, to be kept between runs."""

from collections.abc import Mapping

from fiddler.cache.saved import counts, part, text
from fiddler.cache.worth import Policy
from fiddler.given import shown


def state(policy: Policy) -> dict[str, object]:
    """Return it, JSON-able."""
    return {
        "policy": policy.name,
        "n_experts": [list(policy.history.n_experts)],
        "history": policy.history.state(),
        "worth": policy.state(),
    }


def restore(policy: Policy, saved: Mapping[str, object]) -> None:
    """Go on from it; ValueError, and nothing changed, for another policy's or another model's."""
    saved = part({"state": saved}, "state")
    shape = policy.history.n_experts
    found = text(saved, "policy"), counts(saved, "n_experts", [len(shape)])
    if found != (policy.name, [list(shape)]):
        raise ValueError(f"the saved state is of {shown(found)}, not of this policy and model")
    before = policy.history.state()
    try:
        policy.history.restore(part(saved, "history"))
        policy.restore(part(saved, "worth"))
    except ValueError:
        policy.history.restore(before)
        raise
