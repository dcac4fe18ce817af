"""Who reads what among the ranks of a run."""

from __future__ import annotations

import pytest

from greenprune.energy import Share, node_id, share_devices

Claims = list[tuple[str, list[str]]]


@pytest.mark.parametrize(
    ("claims", "shares"),
    [
        ([("n", ["a"])], [(("a",), True)]),
        ([("n", []), ("n", [])], [((), True), ((), False)]),
        ([("n", ["a", "b"]), ("n", ["b", "a"])], [(("a", "b"), True), ((), False)]),
        ([("n", ["b"]), ("n", ["a", "b", "a"])], [(("b",), True), (("a",), False)]),
        ([("n", ["a"]), ("m", ["c"]), ("n", ["b"])], [(("a",), True), (("c",), True), (("b",), False)]),
    ],
)
def test_each_gpu_and_each_machine_is_read_by_the_first_that_sees_it(
    claims: Claims, shares: list[tuple[tuple[str, ...], bool]]
) -> None:
    assert [share_devices(rank, claims) for rank in range(len(claims))] == [Share(*share) for share in shares]


def test_a_machine_is_known_by_what_the_kernel_made_up_at_boot() -> None:
    assert node_id() == node_id()
    assert node_id()
