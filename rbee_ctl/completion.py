"""Words for the shell's completion (`rbee-ctl --install-completion`): names of machines, models and workers.

Machines come from the inventory, models and workers from there and from the queen, which gets a third of a second to answer.
Whatever goes wrong completes nothing: a person who presses Tab wants no error.

The scripts for bash and zsh are our own: typer's for bash knows nothing of readline, which takes a reference such as
``hf:org/name`` for three words, and typer's for zsh does nothing at the first Tab of a shell. Both ask as fish does: a value a
line, its explanation behind a tab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rbee_ctl.config import Settings

#: Seconds that the queen gets.
QUEEN_LIMIT_S = 0.3

_BASH = r"""
%(complete_func)s() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT}
    COMPREPLY=( $( env _TYPER_COMPLETE_ARGS="$line" _TYPER_COMPLETE_FISH_ACTION=get-args \
                   %(autocomplete_var)s=complete_fish "$1" 2>/dev/null ) )
    COMPREPLY=( "${COMPREPLY[@]%%%%$'\t'*}" )
    # Readline puts an answer behind the last : or = of the word, so the answer begins there too.
    local word=${line##*[[:space:]=]}
    if [[ $word == *:* && $COMP_WORDBREAKS == *:* ]]; then
        COMPREPLY=( "${COMPREPLY[@]#"${word%%"${word##*:}"}"}" )
    fi
}

complete -o default -F %(complete_func)s %(prog_name)s
"""

_ZSH = r"""
#compdef %(prog_name)s

%(complete_func)s() {
  local -a lines values shown
  local line
  lines=("${(@f)$(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _TYPER_COMPLETE_FISH_ACTION=get-args \
    %(autocomplete_var)s=complete_fish %(prog_name)s 2>/dev/null)}")
  for line in $lines; do
    values+=("${line%%%%$'\t'*}")
    shown+=("${line/$'\t'/  -- }")
  done
  (( $#values )) || { _files; return }
  compset -P '--*='
  [[ "$lines" == *$'\t'* ]] && compadd -l -d shown -a values || compadd -d shown -a values
}

# As a file of fpath this is the function's first call itself; read by a person's zshrc it only says who completes.
if [[ $funcstack[1] == _%(prog_name)s ]]; then %(complete_func)s "$@"; else compdef %(complete_func)s %(prog_name)s; fi
"""


def use_own_scripts() -> None:
    """Let ``--install-completion`` and ``--show-completion`` give the scripts above."""
    from typer import _completion_shared

    _completion_shared._completion_scripts.update(bash=_BASH, zsh=_ZSH)


def nodes(incomplete: str) -> list[str]:
    """Return the machines of the inventory that begin so."""
    return _that_begin(incomplete, [name for name, _ in _declared()])


def workers(incomplete: str) -> list[str]:
    """Return the ids of declared and of live workers that begin so."""
    declared = [f"{node}-{_instance(w)}" for node, found in _declared() for w in found]
    return _that_begin(incomplete, [*declared, *(str(w.get("id")) for w in _live())])


def models(incomplete: str) -> list[str]:
    """Return the ids of declared and of served models that begin so."""
    declared = [str(w["model"]) for _, found in _declared() for w in found if w.get("model")]
    return _that_begin(incomplete, [*declared, *(str(w.get("model_id")) for w in _live())])


def _that_begin(incomplete: str, words: list[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)})


def _settings() -> Settings | None:
    from rbee_ctl import config
    from rbee_serve.contract.errors import RbeeError

    try:
        return config.load()
    except (RbeeError, OSError):
        return None


def _declared() -> list[tuple[str, tuple[dict[str, Any], ...]]]:
    """Return machines with their declared workers."""
    from rbee_ctl import inventory
    from rbee_serve.contract.errors import RbeeError

    settings = _settings()
    try:
        return [(h.name, h.workers) for h in inventory.load(settings.inventory_path).hosts.values()] if settings else []
    except (RbeeError, OSError):
        return []


def _live() -> list[dict[str, Any]]:
    """Return what the queen hears of, if it says so at once."""
    from rbee_ctl.queen_client import workers_at_once

    settings = _settings()
    return workers_at_once(settings, QUEEN_LIMIT_S) if settings is not None else []


def _instance(worker: dict[str, Any]) -> str:
    return str(worker.get("name") or f"{worker.get('backend')}{worker.get('device', 0)}")
