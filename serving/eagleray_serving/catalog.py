"""Which models a server has, under which path each stands, and which of them a bare route means. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eagleray_serving.schema import InputKind, Verb, WireError


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a server says about one of its models.

    Attributes:
        name: The model's name.
        version: The full version, such as `r1-step-00001200`.
        verb: The route that it answers.
        inputs: What a request to it carries.
        source: Language of the input of a translation.
        target: Language of the output of a translation.
        scores: What the version scored in its evaluation.
        limits: What a request to it may be.
        labels: What a classifier chooses from; empty where that is not known.
        columns: What an input of a task of your own holds.
    """

    name: str
    version: str
    verb: Verb
    inputs: InputKind
    source: str | None = None
    target: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """The reference of exactly this version."""
        return f"{self.name}@{self.version}"

    @property
    def scope(self) -> str:
        """What a key must be allowed to do."""
        return f"{self.verb}/{self.name}"

    @property
    def path(self) -> str:
        """The route that always means this model."""
        return f"/v1/{self.verb}/{self.name}"

    @property
    def bare_path(self) -> str:
        """The route that all models of the verb share."""
        return f"/v1/{self.verb}"

    def as_json(self) -> dict[str, Any]:
        """Return what `/v1/models` shows."""
        shown = {key: value for key, value in asdict(self).items() if value not in (None, ()) and key != "verb"}
        return {**shown, "ref": self.ref, "path": self.path}


def route_prefixes(cards: Sequence[ModelCard]) -> dict[str, str]:
    """Give each model the route prefix of its application.

    The only model of a verb stands at the bare route itself, so that a request there makes one hop; it answers its
    named route too, because the front goes by the longest matching prefix. Where several share a verb, each stands
    at its named route and the bare one falls through to the edge at `/`.
    """
    verbs = [card.verb for card in cards]
    return {card.name: card.bare_path if verbs.count(card.verb) == 1 else card.path for card in cards}


def choose(cards: Sequence[ModelCard], verb: str, body: Mapping[str, Any]) -> ModelCard:
    """Find the model that a request to a bare route means.

    Args:
        cards: All models of the server.
        verb: The route.
        body: The request's body, not yet checked: only what decides is looked at.

    Raises:
        WireError: 404, no such model; 400, several could be meant.
    """
    candidates = [card for card in cards if card.verb == verb]
    if not candidates:
        raise WireError(404, "unknown_model", f"no model behind /v1/{verb}", "GET /v1/models lists the models")
    if isinstance(body.get("model"), str):
        return find(candidates, body["model"])
    kind: InputKind = "images" if body.get("images") is not None else "text"
    if verb == "classify":
        candidates = [card for card in candidates if card.inputs == kind] or candidates
    for key in ("source", "target"):
        if isinstance(body.get(key), str):
            candidates = [card for card in candidates if getattr(card, key) in (None, body[key])]
    if len(candidates) == 1:
        return candidates[0]
    listed = _list(candidates or [card for card in cards if card.verb == verb])
    if not candidates:
        raise WireError(400, "no_such_pair", "no model translates between these languages", f"there are {listed}")
    raise WireError(400, "model_required", "several models could answer", f"set model to one of {listed}")


def find(cards: Sequence[ModelCard], name: str) -> ModelCard:
    """Find a model by its name.

    Raises:
        WireError: 404, there is none.
    """
    for card in cards:
        if card.name == name:
            return card
    raise WireError(404, "unknown_model", "there is no model of this name here", f"there are {_list(cards)}")


def _list(cards: Sequence[ModelCard]) -> str:
    return ", ".join(
        f"{card.name} ({card.source} to {card.target})" if card.source else card.name for card in cards
    )
