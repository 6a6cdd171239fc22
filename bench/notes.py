"""Why a goal is missed where it is: found by measuring, shown beside the row as long as it is missed."""

NOTES: dict[str, str] = {}
