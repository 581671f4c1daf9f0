"""The classes of a model: their record, and choosing among them."""

import json

from guided_diffusion.errors import UserError
from guided_diffusion.images.classes import (
    Classes,
    choose_classes,
    classes_to_sample,
    number_classes,
    read_classes,
    sampled_classes_setting,
    write_classes,
)

import pytest
import torch

PETS = Classes({2: "owl", 0: "cat", 1: "golden retriever"}, "text", "pets/classes.json")


def test_numbers_go_after_their_value():
    assert number_classes({"10", "9", "010", "0"}, "number", "x") == {"0": 0, "9": 1, "010": 2, "10": 3}
    assert number_classes({"10", "9"}, "text", "x") == {"10": 0, "9": 1}


def test_the_record_is_beside_the_checkpoint(tmp_path):
    write_classes(str(tmp_path), PETS)
    assert json.loads((tmp_path / "classes.json").read_text()) == {
        "order": "text",
        "classes": {"0": "cat", "1": "golden retriever", "2": "owl"},
    }
    before = (tmp_path / "classes.json").stat().st_mtime_ns
    write_classes(str(tmp_path), PETS)
    assert (tmp_path / "classes.json").stat().st_mtime_ns == before
    for name in ("model000002.pt", "ema_0.9999_000002.pt", "any.pt"):
        found = read_classes(str(tmp_path / name))
        assert (found.names, found.order) == (PETS.names, "text") and found.source == str(tmp_path / "classes.json")
        assert list(found.names) == [0, 1, 2]
    assert read_classes("untrained") is None and read_classes("") is None


def test_a_name_that_is_no_text_is_kept(tmp_path):
    odd = Classes({0: "caf\udce9", 1: "猫"}, "text")
    write_classes(str(tmp_path), odd)
    assert read_classes(str(tmp_path / "model000002.pt")).names == odd.names


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        '{"classes": {"0": "cat"}}',
        '{"order": "text", "classes": {}}',
        '{"order": "text", "classes": ["cat"]}',
        '{"order": "text", "classes": {"zero": "cat"}}',
        '{"order": "text", "classes": {"0": 3}}',
        '{"order": "text", "classes": {"1000": "cat"}}',
        '{"order": "text", "classes": {"-1": "cat"}}',
        '{"order": "text", "classes": {"0": "cat", "1": "cat"}}',
        '{"order": "alphabet", "classes": {"0": "cat"}}',
        '{"order": [], "classes": {"0": ["cat"]}}',
    ],
)
def test_a_record_that_was_edited_by_hand(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=r"classes\.json is damaged: expected \{.order"):
        read_classes(str(tmp_path / "model000002.pt"))
    write_classes(str(tmp_path), PETS)  # a training writes its own
    assert read_classes(str(tmp_path / "model000002.pt")).names == PETS.names


def test_the_optimizers_file_has_it_too(tmp_path):
    state = {"state": {}, "param_groups": [], "training": {"classes": PETS.as_json()}}
    torch.save(state, tmp_path / "opt000002.pt")
    for name in ("model000002.pt", "ema_0.9999_000002.pt"):
        found = read_classes(str(tmp_path / name))
        assert found.names == PETS.names and found.source == str(tmp_path / "opt000002.pt")
    assert read_classes(str(tmp_path / "model000004.pt")) is None
    assert read_classes(str(tmp_path / "other.pt")) is None


def test_optimizers_files_without_one(tmp_path):
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt000002.pt")  # guided-diffusion's
    torch.save({"state": {}, "training": {"position": 4}}, tmp_path / "opt000004.pt")  # an earlier version's
    torch.save(PETS, tmp_path / "opt000006.pt")  # a pickled object, which is not loaded
    (tmp_path / "opt000008.pt").write_bytes(b"PK")
    for step in (2, 4, 6, 8):
        assert read_classes(str(tmp_path / f"model{step:06d}.pt")) is None


def test_remote_checkpoints(monkeypatch):
    assert read_classes("https://example.invalid/model000002.pt") is None  # no storage that can be listed
    assert read_classes("nosuchstorage://bucket/model000002.pt") is None


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["owl", "cat"], [0, 2]),
        (["owl,cat"], [0, 2]),
        (["owl, 0"], [0, 2]),
        (["owl 0", "0"], [0, 2]),
        (["1", "golden retriever"], [1]),
        (["cat,golden retriever"], [0, 1]),
        ([",cat", ","], [0]),
    ],
)
def test_names_and_indices(words, chosen):
    assert choose_classes(words, PETS) == chosen


def test_a_name_comes_before_an_index():
    numbers = Classes({0: "0", 1: "10", 2: "2", 3: "cat"}, "text")
    assert choose_classes(["10", "2", "3"], numbers) == [1, 2, 3]
    assert choose_classes(["1"], numbers) == [1]


def test_imagenet_is_known_without_a_record():
    assert choose_classes(["n01443537", "999", "0"], None) == [0, 1, 999]
    some = Classes({281: "n02123045", 744: "n04008634"}, "ImageNet", "x")
    assert choose_classes(["744,n02123045"], some) == [281, 744]
    for word in ("n01440764", "0"):
        with pytest.raises(UserError, match=rf"--classes {word}: no such class"):
            choose_classes([word], some)


@pytest.mark.parametrize(
    ("words", "record", "message"),
    [
        (["cats"], PETS, "--classes cats: no such class; did you mean cat?"),
        (["3"], PETS, "--classes 3: no such class; expected a name or an index of 0: cat, 1: golden"),
        (["-1"], PETS, "--classes -1: no such class; expected"),
        (["n01440765"], None, "--classes n01440765: no such class; did you mean n0144"),
        (["1000"], None, "--classes 1000: no such class; expected a name or an index of ImageNet: a wnid or 0..999"),
        ([","], PETS, "--classes ',' names no class"),
    ],
)
def test_a_class_that_there_is_not(words, record, message):
    with pytest.raises(UserError) as error:
        choose_classes(words, record)
    assert str(error.value).startswith(message)


def recorded(folder, classes):
    folder.mkdir()
    write_classes(str(folder), classes)
    return str(folder / "model.pt")


def test_what_is_sampled_from(tmp_path, capsys):
    pets = recorded(tmp_path / "pets", PETS)
    chosen, record = classes_to_sample([], [pets])
    assert chosen == [0, 1, 2] and record.names == PETS.names
    said = capsys.readouterr().err
    assert (
        said == f"sampling from 3 of 3 classes of {tmp_path}/pets/classes.json: 0: cat, 1: golden retriever, 2: owl\n"
    )
    assert classes_to_sample(["owl"], [pets, pets])[0] == [2]
    capsys.readouterr()

    assert classes_to_sample([], [str(tmp_path / "none.pt")]) == (list(range(1000)), None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"warning: {tmp_path}/none.pt has no record of its classes")
    assert classes_to_sample(["n01440764", "1"], [str(tmp_path / "none.pt")]) == ([0, 1], None)
    assert classes_to_sample([], ["untrained"]) == (list(range(1000)), None)
    assert classes_to_sample([], []) == ([], None) and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--classes is for a class-conditional model"):
        classes_to_sample(["0"], [])


def test_model_and_classifier_of_different_classes(tmp_path, capsys):
    pets = recorded(tmp_path / "pets", PETS)
    cars = recorded(tmp_path / "cars", Classes({0: "bus", 1: "van"}, "text"))
    with pytest.raises(
        UserError, match=r"different classes: 0: cat, .*pets/classes\.json\),\nand 0: bus, 1: van \(.*cars"
    ):
        classes_to_sample([], [pets, cars])
    capsys.readouterr()
    assert classes_to_sample([], [str(tmp_path / "none.pt"), cars])[0] == [0, 1]
    assert f"none.pt has no record of its classes: assuming those of {tmp_path}/cars" in capsys.readouterr().err


def test_older_records_of_runs_are_of_all_classes():
    assert sampled_classes_setting(list(range(1000))) == sampled_classes_setting([]) == {}
    assert sampled_classes_setting([0, 2]) == {"classes_sampled": "0,2"}
