"""Grammars and JSON schemas of requests, made ready for a model's tokens."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rbee_serve.contract.errors import InvalidRequest
from rbee_serve.worker.engine import gbnf, json_schema
from rbee_serve.worker.engine.grammar import Automaton, Matcher, Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rbee_serve.contract.api import SamplingParams
    from rbee_serve.worker.engine.llama import Model

#: Automata kept, and their bytes together: what one request has worked out helps the next with the same grammar.
_KEPT_MAX, _KEPT_BYTES = 16, 64 << 20


class Constraint:
    """What one text must follow, in tokens."""

    def __init__(self, model: Model, automaton: Automaton, vocabulary: Vocabulary) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._matcher = Matcher(automaton)

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        return self._matcher.may_end

    @property
    def must_end(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self._matcher.must_end

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next; raises InvalidRequest when the grammar is too ambiguous to say."""
        return self._matcher.may_end if self._model.is_eog(token) else self._matcher.allows(self._model.piece(token))

    def accept(self, token: int) -> None:
        """Go on by ``token``, which must be allowed."""
        if not self._model.is_eog(token):
            self._matcher.accept(self._model.piece(token))

    def allowed(self) -> NDArray[np.integer[Any]]:
        """Return all tokens that may come next."""
        ids = self._matcher.allowed(self._vocabulary)
        return np.concatenate([ids, self._model.eog_ids]) if self._matcher.may_end else ids


class Constraints:
    """Automata of the grammars used last, and the model's tokens as a tree."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._automata: OrderedDict[str, Automaton] = OrderedDict()
        self._vocabulary: Vocabulary | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """All tokens that are text, as a tree; begun when first asked for, whole when it has grown enough."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._pieces())
        return self._vocabulary

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        model = self.model
        for token in range(model.n_vocab):
            if not model.is_eog(token) and (piece := model.piece(token)):
                yield token, piece

    @property
    def prepared(self) -> bool:
        """Whether a draw finds the vocabulary complete."""
        return self._vocabulary is not None and self._vocabulary.whole

    def prepare(self, steps: int) -> bool:
        """Go on with the vocabulary by so many steps; return whether a request needs more of it (0.4 s for 49,000 tokens)."""
        if self._vocabulary is None or self._vocabulary.whole:
            return False
        self._vocabulary.grow(steps)
        return not self._vocabulary.whole

    def tidy(self) -> None:
        """Forget the automata used least recently where they are too many or too large."""
        while len(self._automata) > _KEPT_MAX or sum(a.size for a in self._automata.values()) > _KEPT_BYTES:
            self._automata.popitem(last=False)

    def of(self, params: SamplingParams) -> Constraint | None:
        """Return the constraint that a request asks for.

        Raises InvalidRequest: what is wrong with the grammar or the schema, and where.
        """
        if params.grammar is None and params.json_schema is None:
            return None
        name = "grammar" if params.grammar is not None else "json_schema"
        try:
            key = params.grammar or "\0" + json.dumps(params.json_schema)
            automaton = self._automata.pop(key, None)
            if automaton is None:
                text = params.grammar if params.grammar is not None else json_schema.to_gbnf(params.json_schema)
                automaton = Automaton(gbnf.parse(text))
        except gbnf.GrammarError as e:
            raise InvalidRequest(f"{name}: {e}", field=name) from e
        except RecursionError as e:
            raise InvalidRequest(f"{name}: it is nested too deeply", field=name) from e
        except (TypeError, AttributeError, KeyError, ValueError) as e:
            # A schema is any JSON that a client sends: a keyword's value of a type that nobody thought of ends up here.
            raise InvalidRequest(f"{name}: a keyword has a value of the wrong type ({e})", field=name) from e
        self._automata[key] = automaton
        self.tidy()
        return Constraint(self.model, automaton, self.vocabulary)
