"""A cache within a budget, held to a plain list of what was used last."""

from hypothesis import given
from hypothesis import strategies as st

from workers.lru import LruCache

steps = st.lists(st.tuples(st.sampled_from(["get", "put", "drop"]), st.integers(0, 5), st.integers(0, 9)), max_size=40)


@given(steps, st.integers(0, 20))
def test_it_keeps_what_was_used_last_within_its_budget(steps: list[tuple[str, int, int]], budget: int) -> None:
    cache: LruCache[int, int] = LruCache(budget, lambda size: size)
    used: list[tuple[int, int]] = []  # key and size, the one used last at the end
    for step, key, size in steps:
        known = [entry for entry in used if entry[0] == key]
        used = [entry for entry in used if entry[0] != key]
        if step == "get":
            assert cache.get(key) == (known[0][1] if known else None)
            used += known
        elif step == "put":
            assert cache.put(key, size) == size
            used.append((key, size))
            while len(used) > 1 and sum(size for _, size in used) > budget:
                used.pop(0)
        else:
            cache.drop(key)
        assert (len(cache), cache.held) == (len(used), sum(size for _, size in used))
    assert [cache.get(key) for key, _ in used] == [size for _, size in used]


def test_without_sizes_every_value_counts_one() -> None:
    cache: LruCache[str, str] = LruCache(2)
    for key in "abc":
        cache.put(key, key.upper())
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (None, "B", "C")
