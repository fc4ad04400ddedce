"""What teachers that stand side by side have to have in common."""

from typing import Any

from jaxkd.loop.checks import check_same_rows, check_source


def check_is_list(name: str, teachers: Any) -> None:
    """Raises an error unless there is a list of them, with one at least."""
    if not isinstance(teachers, list | tuple):
        raise TypeError(f"`{name}` is a {type(teachers).__name__}; give a list of LinearLogits or Logits")
    if not teachers:
        raise ValueError(f"`{name}` is empty; give one LinearLogits or Logits at least")


def check_sources_alike(name: str, teachers: Any) -> None:
    """Raises an error for sources of other rows or another vocabulary than the first one's."""
    check_is_list(name, teachers)
    for i, teacher in enumerate(teachers):
        own = f"{name}[{i}]"
        check_source(teacher, f"{own}.")
        check_same_rows(teachers[0], teacher, (f"{name}[0].{teachers[0].ROWS}", f"{own}.{teacher.ROWS}"))
        if teacher.vocabulary != teachers[0].vocabulary:
            raise ValueError(
                f"`{own}` has V={teacher.vocabulary} but `{name}[0]` has V={teachers[0].vocabulary}; give "
                "teachers of one tokenizer, with heads cut to one width"
            )
