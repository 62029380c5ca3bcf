"""Small random caches for the store's tests, and the check that they are valid input."""

from helpers.caches import standard_case


def test_cases_are_valid_rows() -> None:
    case = standard_case()
    for part in case.parts:
        part.rows.validate(len(case.id_of_rank))
        assert part.rows.num_tokens == sum(map(len, part.response_ids))
