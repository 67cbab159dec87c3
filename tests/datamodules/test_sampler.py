"""The sampler yields a rank's units one after the other, and leaves to others what others hold."""

from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.partition import Partition, UnitPlan, assign

PARTITION = Partition(num_rows=22, chunk_rows=5)


def lengths(rows: object) -> list[int]:
    return [1 + row * 7 % 5 for row in rows]  # type: ignore[attr-defined]


def test_every_batch_lies_inside_one_unit_and_units_come_in_order() -> None:
    batches = list(UnitBatchSampler(UnitPlan(PARTITION, [3, 0, 4]), lengths, batch_size=2))
    units = [{PARTITION.unit_of(row) for row in batch} for batch in batches]
    assert all(len(unit) == 1 for unit in units)
    assert [unit.pop() for unit in units] == [3, 3, 3, 0, 0, 0, 4]


def test_batches_of_a_unit_do_not_depend_on_the_other_units() -> None:
    def of(world: int) -> list[list[int]]:
        shares = [assign(range(5), world, rank) for rank in range(world)]
        return sorted(
            batch for share in shares for batch in UnitBatchSampler(UnitPlan(PARTITION, share), lengths, 3, 9)
        )

    assert of(1) == of(2) == of(3)


def test_units_held_elsewhere_are_left_out_and_asked_for_once_more_at_the_end() -> None:
    asked: list[tuple[int, bool]] = []

    def claim(unit: int, patient: bool = False) -> bool:
        asked.append((unit, patient))
        return unit != 1 and (unit != 0 or patient)

    sampler = UnitBatchSampler(UnitPlan(PARTITION, [0, 1, 2], claim), lengths, batch_size=5)
    assert [PARTITION.unit_of(batch[0]) for batch in sampler] == [2, 0]
    assert asked == [(0, False), (1, False), (2, False), (0, True), (1, True)]


def test_a_unit_is_claimed_only_when_its_turn_comes() -> None:
    asked: list[int] = []

    def claim(unit: int, patient: bool = False) -> bool:
        asked.append(unit)
        return True

    batches = iter(UnitBatchSampler(UnitPlan(PARTITION, [0, 1, 2], claim), lengths, batch_size=5))
    next(batches)
    assert asked == [0]


def test_dataloader_gives_whole_batches_to_collate() -> None:
    sampler = UnitBatchSampler(UnitPlan(PARTITION, [4]), lengths, batch_size=5)
    loader = unit_dataloader([f"sample {row}" for row in range(22)], sampler, " + ".join)
    assert list(loader) == ["sample 21 + sample 20"]
