"""Finding, labelling, choosing and reading images, on real files."""

import io
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from contextlib import nullcontext

from guided_diffusion.errors import UserError
from guided_diffusion.images import folder as image_folder
from guided_diffusion.images import io as image_io
from guided_diffusion.images.classes import Classes, OtherClasses
from guided_diffusion.images.folder import (
    LabelledImage,
    UnknownClasses,
    check_outside,
    choose_images,
    label_images,
    label_where_known,
    list_images,
    read_labels_file,
    shortage,
)
from guided_diffusion.images.imagenet import CLASS_INDEX, DEVKIT_IDS, WNIDS
from guided_diffusion.images.io import (
    EXTENSIONS,
    UnreadableImage,
    center_crop_arr,
    open_image,
    random_crop_arr,
    read_image,
    to_float,
)
from guided_diffusion.system.other_scripts import REPOSITORY
from guided_diffusion.training import data as training_data

import numpy as np
import pytest
from conftest import PHOTOGRAPHS, run_python
from PIL import Image
from reference import golden

CAT = PHOTOGRAPHS / "n02123045" / "n02123045_1.JPEG"
EXIF_ORIENTATION = 0x0112

# What PIL's transpositions must be applied to an upright picture so that a camera's orientation flag undoes it.
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def touch(folder, *paths):
    """Empty files: enough where only names matter."""
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return str(folder)


def gradient(width=40, height=30):
    """A picture without any symmetry, smooth enough for JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 9) * np.cos(y / 14)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def labelled(data_dir, labels_file=None):
    """path -> (label, class_name) of all images of a folder."""
    images = label_images(str(data_dir), list_images(str(data_dir)), labels_file)
    return {image.path: (image.label, image.class_name) for image in images}


# Classes


def test_classes_are_sorted_and_the_two_numberings_are_permutations():
    assert len(WNIDS) == 1000 and list(WNIDS) == sorted(set(WNIDS))
    assert sorted(DEVKIT_IDS) == list(range(1, 1001))
    assert [CLASS_INDEX[wnid] for wnid in WNIDS] == list(range(1000))
    known = {"n01440764": (0, 449), "n02123045": (281, 174), "n07920052": (967, 947), "n15075141": (999, 889)}
    for wnid, (index, devkit_id) in known.items():
        assert (CLASS_INDEX[wnid], DEVKIT_IDS[index]) == (index, devkit_id)


# Finding


def test_list_is_sorted_by_code_point_and_knows_the_extensions(tmp_path):
    names = ["b.JPEG", "a/z.png", "a-b/y.Gif", "Z.jpg", "é.webp", "a/b/c.BMP", "a.jpeg", "ü/日本.jpg"]
    names += ["t.tif", "t.TIFF", "j.jfif", "j.jp2", "p.ppm", "p.pgm"]
    touch(tmp_path, *names, "a/notes.txt", ".hidden.jpg", ".cache/x.jpg", "a/._z.png", "jpg")
    assert list_images(str(tmp_path)) == sorted(names)
    assert list_images(f"{tmp_path}/") == sorted(names)


def test_list_follows_links_but_not_in_circles(tmp_path):
    touch(tmp_path, "elsewhere/n01440764/a.jpg", "data/b.jpg")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "linked.jpg").symlink_to(tmp_path / "data" / "b.jpg")
    (tmp_path / "data" / "broken.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "pipe.jpg")
    (tmp_path / "data" / "linked_pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / "data" / "circle.jpg").symlink_to("circle.jpg")
    expected = ["b.jpg", "broken.jpg", "circle.jpg", "linked.jpg", "linked/n01440764/a.jpg"]
    assert list_images(str(tmp_path / "data")) == expected


def test_links_that_lead_to_each_other_cost_nothing_else(tmp_path):
    """A link to itself, two links to each other, and two folders with a link to each other."""
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    for link, target in (("self", "self"), ("x", "y"), ("y", "x"), ("x.jpg", "y.jpg"), ("y.jpg", "x.jpg")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "a/loop").symlink_to("../b")
    (tmp_path / "b/loop").symlink_to("../a")
    expected = ["a/1.jpg", "a/loop/2.jpg", "b/2.jpg", "b/loop/1.jpg", "x.jpg", "y.jpg"]
    assert list_images(str(tmp_path)) == expected
    with pytest.raises(UnreadableImage, match=r"x\.jpg' cannot be read: Too many levels of symbolic links"):
        read_image(str(tmp_path / "x.jpg"), 8)


def test_files_that_are_skipped_are_reported_once(tmp_path, capsys):
    touch(tmp_path, "1.jpg", "2.heic", "3.HEIC", "sub/4.psd", "5")
    for _ in range(2):
        assert list_images(str(tmp_path)) == ["1.jpg"]
    expected = f"warning: 4 file(s) skipped: .heic, .psd, no extension (in {str(tmp_path)!r})\n"
    assert capsys.readouterr().err == expected


def test_names_that_are_not_utf8_are_listed_labelled_and_read(tmp_path):
    name = b"n01440764_\xff\xe9.jpg"
    gradient().save(tmp_path / "x.jpg")
    os.rename(tmp_path / "x.jpg", os.fsencode(tmp_path) + b"/" + name)
    (path,) = list_images(str(tmp_path))
    assert os.fsencode(path) == name
    assert labelled(tmp_path) == {path: (0, "n01440764")}
    assert read_image(os.path.join(tmp_path, path), 16).shape == (16, 16, 3)
    (tmp_path / "labels").write_bytes(name + b" n01443537\n")
    assert labelled(tmp_path, str(tmp_path / "labels")) == {path: (1, "n01443537")}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found no files at all"),
        ([".hidden.jpg"], "found no files at all"),
        (["a.txt", "b.txt", "c.tar", "deep/README"], "found 4 file(s): .txt, .tar, no extension"),
        (["val.tar"], "found 1 file(s): .tar"),
    ],
)
def test_folder_without_images(tmp_path, files, message):
    with pytest.raises(UserError) as error:
        list_images(touch(tmp_path, *files))
    assert message in str(error.value) and "--data_dir" in str(error.value) and ".jpeg" in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no folder of images was given: --data_dir"):
        list_images("")
    with pytest.raises(UserError, match=r"missing' does not exist \(--data_dir\)"):
        list_images(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"a\.jpg' is a file, not a folder \(--data_dir\)"):
        list_images(touch(tmp_path, "a.jpg") + "/a.jpg")
    with pytest.raises(UserError, match="--data_dir"):
        list_images("nosuchstorage://bucket/images")


def test_remote_storage_is_listed_and_read_through_blobfile(monkeypatch):
    """blobfile's calls on local files, which stand in for a bucket."""
    before = list_images(str(PHOTOGRAPHS))
    image = read_image(str(CAT), 64)
    monkeypatch.setattr(image_folder, "is_remote", lambda path: True)
    assert list_images(str(PHOTOGRAPHS)) == before
    np.testing.assert_array_equal(read_image(str(CAT), 64), image)


# Labelling by path


@pytest.mark.parametrize(
    "path",
    [
        "n01443537/x.jpg",
        "val/n01443537/ILSVRC2012_val_00000001.JPEG",
        "n01440764/n01443537/x.jpg",
        "n01443537/n01440764_1.jpg",
        "n01443537_10026.JPEG",
        "sub/n01443537_a_b.png",
        "ILSVRC2012_val_00000001_n01443537.JPEG",
    ],
)
def test_wnid_in_a_path(tmp_path, path):
    assert labelled(touch(tmp_path, path)) == {path: (1, "n01443537")}


def test_imagenet_labels_are_class_indices_whichever_classes_are_there():
    assert {path: label for path, (label, _) in labelled(PHOTOGRAPHS).items()} == {
        "n02123045/n02123045_1.JPEG": 281,
        "n04008634/n04008634_1.JPEG": 744,
        "n04485082/n04485082_1.JPEG": 872,
        "n07920052/n07920052_1.JPEG": 967,
    }


def test_equal_names_in_two_folders_keep_their_own_labels(tmp_path):
    touch(tmp_path, "n01443537/1.jpg", "n01440764/1.jpg")
    assert labelled(tmp_path) == {"n01440764/1.jpg": (0, "n01440764"), "n01443537/1.jpg": (1, "n01443537")}


def test_other_folders_are_labelled_by_class_folder(tmp_path):
    touch(tmp_path, "zebra/a_1.jpg", "ant/deep/n1.jpg", "n99999999/b.jpg")
    expected = {"ant/deep/n1.jpg": (0, "ant"), "n99999999/b.jpg": (1, "n99999999"), "zebra/a_1.jpg": (2, "zebra")}
    assert labelled(tmp_path) == expected


def test_flat_folders_are_labelled_by_prefix_if_all_names_have_one(tmp_path):
    touch(tmp_path, "dog_1.jpg", "cat_1.jpg", "cat_2_x.jpg")
    assert labelled(tmp_path) == {"cat_1.jpg": (0, "cat"), "cat_2_x.jpg": (0, "cat"), "dog_1.jpg": (1, "dog")}
    touch(tmp_path, "holiday.jpg")
    assert set(labelled(tmp_path).values()) == {(None, "")}


def test_some_images_outside_of_the_classes(tmp_path):
    touch(tmp_path, "n01440764/a.jpg", "n01440764/b.jpg", "samples/c.jpg")
    with pytest.raises(
        UserError, match=r"1 of 3 images in .*--data_dir.* no ImageNet class: 'samples/c\.jpg'\."
    ) as error:
        labelled(tmp_path)
    assert "--labels_file" in str(error.value)

    touch(tmp_path / "plain", "cat/a.jpg", *(f"{i}.jpg" for i in range(5)))
    with pytest.raises(
        UserError, match=r"5 of 6 images .*--data_dir.* outside .*: '0\.jpg', '1\.jpg', '2\.jpg', \.\.\."
    ):
        labelled(tmp_path / "plain")


def test_official_validation_files_need_a_labels_file(tmp_path):
    touch(tmp_path, "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=r"do not give a class: 'val/ILSVRC2012_val_00000001\.JPEG'") as error:
        labelled(tmp_path)
    assert "Give --labels_file: Kaggle's LOC_val_solution.csv" in str(error.value)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["ILSVRC2012_val_00000001.JPEG"], "the names of ImageNet's validation files do not give a class"),
        (["cat/1.jpg", "dog/1.jpg", "root.jpg"], "1 of 3 images .* are outside the class folders: 'root.jpg'"),
        (["n01440764/1.jpg", "samples/1.jpg"], "1 of 2 images .* name no ImageNet class: 'samples/1.jpg'"),
        (["0.jpg", "1.jpg"], "do not give the classes of the images"),
    ],
)
def test_classes_that_need_not_be_known(tmp_path, files, why):
    data_dir = touch(tmp_path, *files)
    images, found = label_where_known(data_dir, list_images(data_dir))
    assert images == [LabelledImage(path, None, "") for path in sorted(files)]
    assert re.search(why, found)
    if len(files) != 2 or files[0] != "0.jpg":
        with pytest.raises(UnknownClasses, match=why):
            labelled(tmp_path)


def test_known_classes_are_the_same_whether_they_need_be_or_not(tmp_path):
    folders = (["n01440764/1.jpg", "n01443537_2.jpg"], ["cat/1.jpg", "dog/1.jpg"], ["cat_1.jpg", "cat_2.jpg"])
    for number, files in enumerate(folders):
        data_dir = touch(tmp_path / str(number), *files)
        paths = list_images(data_dir)
        assert label_where_known(data_dir, paths) == (label_images(data_dir, paths), None)
    (tmp_path / "labels").write_text("other.jpg n01440764\n")
    with pytest.raises(UserError, match="no entry for 2 of 2 images"):  # a file that was given is no guess
        label_where_known(data_dir, paths, str(tmp_path / "labels"))


def test_folders_of_numbers_go_as_text_with_a_warning_or_as_asked_for(tmp_path, capsys):
    data_dir = touch(tmp_path, *(f"{i}/a.jpg" for i in range(12)))
    paths = list_images(data_dir)

    def names(class_order):
        images = sorted(label_images(data_dir, paths, None, class_order), key=lambda image: image.label)
        assert [image.label for image in images] == list(range(12))
        return [image.class_name for image in images]

    assert names("") == names("text") == sorted(map(str, range(12)))
    assert capsys.readouterr().err.count("are numbers, ordered as text: 0, 1, 10, 11, 2, 3, ... 9") == 1
    assert names("number") == [str(i) for i in range(12)]
    labelled(touch(tmp_path / "few", "0/a.jpg", "1/a.jpg", "2/a.jpg"))  # where it makes no difference
    assert capsys.readouterr().err == ""
    touch(tmp_path, "cat/a.jpg")
    with pytest.raises(UserError, match=r"--class_order number: 'cat', a class in .* is not a whole number"):
        label_images(data_dir, [*paths, "cat/a.jpg"], None, "number")


def test_the_classes_of_a_model_number_those_of_a_folder_by_name(tmp_path):
    model = Classes({0: "ant", 1: "bee", 2: "cat", 5: "n01440764"}, "text", "x/classes.json")
    data_dir = touch(tmp_path / "own", "bee/1.jpg", "cat/1.jpg")
    images = label_images(data_dir, list_images(data_dir), None, "", model)
    assert [(image.label, image.class_name) for image in images] == [(1, "bee"), (2, "cat")]
    data_dir = touch(tmp_path / "imagenet", "n01440764/1.jpg")
    assert [image.label for image in label_images(data_dir, list_images(data_dir), None, "", model)] == [5]
    data_dir = touch(tmp_path / "own", "fox/1.jpg")
    with pytest.raises(OtherClasses) as error:
        label_images(data_dir, list_images(data_dir), None, "", model)
    assert str(error.value) == (
        f"1 of 3 classes in {data_dir!r} (--data_dir) are not among the model's 4: fox.\n"
        "The model's are ant, bee, cat, n01440764 (x/classes.json)"
    )
    numbers = Classes({0: "0", 1: "1", 2: "10", 3: "2"}, "text", "x/classes.json")
    data_dir = touch(tmp_path / "numbers", "2/1.jpg", "10/1.jpg")
    for order in ("", "text"):
        images = label_images(data_dir, list_images(data_dir), None, order, numbers)
        assert {image.class_name: image.label for image in images} == {"2": 3, "10": 2}
    with pytest.raises(
        UserError, match=r"--class_order number contradicts x/classes\.json, where the order is 0, 1, 10"
    ):
        label_images(data_dir, list_images(data_dir), None, "number", numbers)


# Labelling by file

LABELS_FILES = {
    "kaggle": "ImageId,PredictionString\n"
    "ILSVRC2012_val_00000002,n03995372 85 1 499 272 \n"
    "ILSVRC2012_val_00000001,n01443537 37 18 492 274 n01443537 0 0 5 -1\n",
    "wnids": "n01443537\nn03995372\nn01440764\n",
    "devkit ids": f"450\n{DEVKIT_IDS[CLASS_INDEX['n03995372']]}\n449\n",
    "pairs": "ILSVRC2012_val_00000001.JPEG n01443537\nILSVRC2012_val_00000002.JPEG n03995372\n",
    "pairs without extension": "ILSVRC2012_val_00000001\tn01443537\nILSVRC2012_val_00000002  n03995372\n\n",
    "csv": "ILSVRC2012_val_00000001.JPEG,n01443537\nILSVRC2012_val_00000002.JPEG, n03995372",
    "csv with a header": '"filename","wnid"\n"ILSVRC2012_val_00000001.JPEG","n01443537"\n\n'
    "ILSVRC2012_val_00000002.JPEG,n03995372\n",
    "other extension": "./ILSVRC2012_val_00000001.png n01443537\nILSVRC2012_val_00000002.png n03995372\n",
    "indices": f"ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000002.JPEG {CLASS_INDEX['n03995372']}\n",
    "csv of indices": f"name,class\nILSVRC2012_val_00000001,1\nILSVRC2012_val_00000002,{CLASS_INDEX['n03995372']}\n",
    "dos": "\ufefffilename wnid\r\nILSVRC2012_val_00000001.JPEG n01443537\r\nILSVRC2012_val_00000002 n03995372\r\n",
}


@pytest.mark.parametrize("form", LABELS_FILES)
def test_labels_file_forms(tmp_path, form):
    touch(tmp_path / "data", "ILSVRC2012_val_00000001.JPEG", "sub/ILSVRC2012_val_00000002.JPEG")
    (tmp_path / "labels").write_bytes(LABELS_FILES[form].encode())
    assert labelled(tmp_path / "data", str(tmp_path / "labels")) == {
        "ILSVRC2012_val_00000001.JPEG": (1, "n01443537"),
        "sub/ILSVRC2012_val_00000002.JPEG": (CLASS_INDEX["n03995372"], "n03995372"),
    }


@pytest.mark.parametrize("form", ["wnids", "devkit ids"])
def test_labels_file_of_all_validation_images(tmp_path, form):
    index = np.random.default_rng(0).integers(1000, size=50000)
    (tmp_path / "labels").write_text("".join(f"{(WNIDS if form == 'wnids' else DEVKIT_IDS)[i]}\n" for i in index))
    labels = read_labels_file(str(tmp_path / "labels"))
    assert len(labels) == 50000
    assert [labels[f"ILSVRC2012_val_{i:08d}"] for i in (1, 777, 50000)] == index[[0, 776, 49999]].tolist()


def test_labels_file_with_folders_and_spaces_and_before_the_path(tmp_path):
    touch(tmp_path / "data", "a/1.jpg", "b/1.jpg", "n01440764/my, cat.jpg")
    (tmp_path / "labels").write_text("a/1.jpg n01443537\nb/1.jpg n01440764\nmy, cat.jpg n02123045\n")
    assert {path: label for path, (label, _) in labelled(tmp_path / "data", str(tmp_path / "labels")).items()} == {
        "a/1.jpg": 1,
        "b/1.jpg": 0,
        "n01440764/my, cat.jpg": 281,
    }


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ("a.jpg 65 extra\n", 1, "found 'a.jpg 65 extra'; expected Kaggle's"),
        ("a.jpg 65\nb.jpg n01440764\n", 2, "found 'b.jpg n01440764'; expected Kaggle's"),
        ("a.jpg 65\nb.jpg 1000\n", 2, "1000 is not a class index (0..999)"),
        ("n01440764 tench, Tinca tinca\n", 1, "found 'n01440764 tench, Tinca tinca'; expected Kaggle's"),
        ('{"0": ["n01440764", "tench"]}', 1, "found '{0: [n01440764, tench]}'; expected Kaggle's"),
        ("file,wnid\na.jpg,n01440764\nb.jpg,tench\n", 3, "found 'b.jpg,tench'; expected Kaggle's"),
        ("n01440764\n\nn01440764\n", 2, "found ''; expected Kaggle's"),
        ("n01440764\n449\n", 2, "found '449'; expected Kaggle's"),
        ("a.jpg n01440764\nb.jpg n01443537\na.jpeg n01443537\n", 3, "'a' had another class on an earlier line"),
        ("a.jpg n99999999\n", 1, "unknown n99999999"),
        ("n01440764\nn99999999\n", 2, "unknown n99999999"),
        ("449\n0\n", 2, "0 is not an ILSVRC2012_ID (1..1000)"),
        ("1001\n", 1, "1001 is not an ILSVRC2012_ID (1..1000)"),
    ],
)
def test_labels_file_of_another_form(tmp_path, content, line, found):
    file = tmp_path / "labels"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_labels_file(str(file))
    assert str(error.value).startswith(f"--labels_file {str(file)!r}, line {line}: {found}")


def test_labels_file_that_lists_the_classes(tmp_path):
    (tmp_path / "labels").write_text("\n".join(WNIDS))
    with pytest.raises(UserError, match=r"--labels_file .* lists the classes, not images"):
        read_labels_file(str(tmp_path / "labels"))


def test_labels_file_missing_empty_or_binary(tmp_path):
    with pytest.raises(UserError, match=r"--labels_file .*missing' cannot be read: No such file or directory"):
        read_labels_file(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"--labels_file .* cannot be read: Is a directory"):
        read_labels_file(str(tmp_path))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(UserError, match=r"--labels_file .*empty' is empty; expected Kaggle's"):
        read_labels_file(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"--labels_file .*, line 1: found .*; expected Kaggle's"):
        read_labels_file(str(CAT))


def test_images_without_an_entry(tmp_path):
    touch(tmp_path / "data", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG", "holiday.jpg")
    (tmp_path / "labels").write_text("n01443537\nn03995372\n")
    with pytest.raises(UserError) as error:
        labelled(tmp_path / "data", str(tmp_path / "labels"))
    assert "no entry for 2 of 3 images" in str(error.value)
    assert "'ILSVRC2012_val_00000003.JPEG', 'holiday.jpg'" in str(error.value)
    assert "It has 2, the first for 'ILSVRC2012_val_00000001'." in str(error.value)


@pytest.mark.parametrize("stem", ["img{}", "cat_{}", "cat_{}_t0400"])
def test_samples_have_the_classes_of_the_images_that_they_started_from(stem, tmp_path):
    """With names, with a list of labels, and by a path that does not end in the name of the folder."""
    starts = [f"{stem.format(i)}.png" for i in (1, 2, 10)]
    samples = [f"{stem.format(i)}_t0500{which}.JPEG" for i in (1, 2, 10) for which in ("", "_s002", "_s002_u03")]
    of_starts = label_images("photos", starts)
    expected = [image for image in of_starts for _ in range(3)]
    (tmp_path / "t_5_10_images").mkdir()
    for data_dir in ("out/t_5_10_images", f"{tmp_path}/t_5_10_images/.", "gs://b/t_5_10_images/"):
        found = label_images(data_dir, samples)
        assert [image.path for image in found] == samples
        assert [(image.label, image.class_name) for image in found] == [(i.label, i.class_name) for i in expected]
    (tmp_path / "labels.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(starts)))
    labelled = label_images("t_5_10_images", samples, str(tmp_path / "labels.txt"))
    assert [image.label for image in labelled] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_an_output_inside_of_the_images(tmp_path, monkeypatch):
    """Through links of all kinds; not in hidden folders, which are not searched."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "a", other / "b"):
        folder.mkdir(parents=True)
        (folder / "x.png").touch()
    (data / "linked").symlink_to(other)
    (tmp_path / "data_too").symlink_to(data)
    monkeypatch.chdir(data)
    images = list_images(str(data))
    below = (data, data / "out", data / "a/out/t_1_2_images", other / "new", other / "b", tmp_path / "data_too/c")
    for output in below:
        for data_dir in (str(data), f"{tmp_path}/data_too/", "."):
            with pytest.raises(UserError, match=r"\(--output\), which is inside '.*' \(--data_dir\): the next run"):
                check_outside([str(tmp_path / "fine"), str(output)], data_dir, images)
    for output in (tmp_path / "out", data / ".out/c", tmp_path / "data_2", "gs://data", "../results"):
        check_outside([str(output)], str(data), images)
    for output, inside in (("gs://b/data/out", True), ("gs://b/data2", False), ("gs://b/data/.out/c", False)):
        with pytest.raises(UserError) if inside else nullcontext():
            check_outside([output], "gs://b/data/", ["a/x.png"])


# Choosing


def images_of(*labels):
    return [LabelledImage(f"{label}_{i}", label, str(label)) for i, label in enumerate(labels)]


def test_choice_goes_class_by_class_and_by_name():
    images = images_of(7, 3, 7, 3, 5, 3)
    random.Random(0).shuffle(images)
    assert [image.path for image in choose_images(images, 2, 2)] == ["3_1", "3_3", "5_4"]
    assert [image.path for image in choose_images(images, 9, 9)] == ["3_1", "3_3", "3_5", "5_4", "7_0", "7_2"]
    assert [image.path for image in choose_images(images, 9, 9, 4)] == ["3_1", "3_3", "3_5", "5_4"]


def test_images_without_classes_are_all_chosen():
    images = [LabelledImage(f"{i}.jpg", None, "") for i in range(30)]
    assert choose_images(images[::-1], 1, 1) == sorted(images, key=lambda image: image.path)
    assert len(choose_images(images, 1000, 10, 20)) == 20
    assert shortage(images, images, 1000, 10) is None and shortage(images, images, 1000, 10, 30) is None
    assert shortage(images, images, 1000, 10, 31) == "31 images asked for (--num_samples), 30 found"


@pytest.mark.parametrize("flag", ["num_classes", "num_per_class", "num_samples"])
def test_choice_of_nothing(flag):
    with pytest.raises(UserError, match=f"--{flag} is 0; expected 1 or more"):
        choose_images(images_of(1), **{"num_classes": 1, "num_per_class": 1, "num_samples": 1, flag: 0})


@pytest.mark.parametrize(
    ("num_classes", "num_per_class", "num_samples", "message"),
    [
        (2, 1, None, None),
        (2, 2, 3, None),
        (9, 9, 3, None),
        (3, 1, None, "2 of 3 images in 2 classes are taken, 3 were asked for (--num_classes 3, --num_per_class 1)"),
        (2, 2, None, "3 of 3 images in 2 classes are taken, 4 were asked for (--num_classes 2, --num_per_class 2)"),
        (
            *(9, 9, 20),
            "3 of 3 images in 2 classes are taken, 20 were asked for (--num_classes 9, --num_per_class 9, "
            "--num_samples 20)",
        ),
    ],
)
def test_shortage(num_classes, num_per_class, num_samples, message):
    asked = (num_classes, num_per_class, num_samples)
    found = images_of(4, 4, 8)
    assert shortage(found, choose_images(found, *asked), *asked) == message


# Reading


@pytest.mark.parametrize(
    "name", ["crop_100x300_to_64", "crop_1024x700_to_64", "crop_256x256_to_256", "crop_500x375_to_64"]
)
def test_center_crop_is_the_reference(name):
    reference = golden(name)
    y, x = np.mgrid[0 : reference.meta.h, 0 : reference.meta.w].astype(float)
    channels = [
        127.5 + 127.5 * np.sin(x / 7 + y / 31),
        x * 255 / (reference.meta.w - 1),
        127.5 + 127.5 * np.cos(y / 5 - x / 53),
    ]
    image = Image.fromarray(np.stack(channels, axis=-1).round().clip(0, 255).astype(np.uint8))
    difference = np.abs(center_crop_arr(image, reference.meta.size).astype(int) - reference.out)
    # Exact with the reference's Pillow; other versions round a few pixels to the next level.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (300, 17), (17, 300), (64, 64), (63, 65), (1000, 640)])
@pytest.mark.parametrize("extension", [extension.removeprefix(".") for extension in EXTENSIONS])
def test_every_size_and_format_is_read(tmp_path, size, extension):
    mode = {"pbm": "1", "pgm": "L"}.get(extension, "RGB")
    gradient(*size).convert(mode).save(tmp_path / f"x.{extension}")
    image = read_image(str(tmp_path / f"x.{extension}"), 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8


@pytest.mark.parametrize(
    ("extension", "frames"), [("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG"), ("jpg", "MPO"), ("tif", "TIFF")]
)
def test_first_of_several_frames_is_read(tmp_path, extension, frames):
    other = Image.new("RGB", (40, 30), "red")
    gradient().save(tmp_path / f"x.{extension}", frames, save_all=True, append_images=[other], quality=98)
    image = np.asarray(open_image(str(tmp_path / f"x.{extension}")), dtype=int)
    assert np.abs(image - np.asarray(gradient())).mean() < 8


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(tmp_path, orientation, extension):
    upright = gradient()
    turned = upright.transpose(TURNED[orientation]) if TURNED[orientation] is not None else upright
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    turned.save(tmp_path / f"x.{extension}", exif=exif, quality=98)
    image = open_image(str(tmp_path / f"x.{extension}"))
    assert image.size == upright.size
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(upright)).mean() < 3


def png_of(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_grey_palette_and_cmyk_are_the_same_colours(tmp_path):
    original = gradient()
    grey = np.asarray(original.convert("L"), dtype=int)
    original.convert("L").save(tmp_path / "grey.jpg", quality=98)
    assert np.abs(np.asarray(open_image(str(tmp_path / "grey.jpg")), dtype=int) - grey[..., None]).max() <= 4

    palette = original.quantize(64)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(open_image(str(tmp_path / "palette.png")), palette.convert("RGB"))

    original.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    assert np.abs(np.asarray(open_image(str(tmp_path / "cmyk.jpg")), dtype=int) - np.asarray(original)).mean() < 3

    black_and_white = Image.fromarray(grey > 128)
    black_and_white.save(tmp_path / "1.png")
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / "1.png")))[..., 0], 255 * (grey > 128))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as stored:
        assert stored.mode.startswith("I")
    image = np.asarray(open_image(str(tmp_path / "x.png")))
    np.testing.assert_array_equal(image, np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=-1))

    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(open_image(str(tmp_path / "turned.png")), image[::-1, ::-1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([10, 10, 10, 200, 200, 200])
        image.paste(0, (0, 0, 4, 8))
        options = {"transparency": 0}
    elif mode == "RGB":
        image = image.convert("RGB")
        options = {"transparency": (10, 10, 10)}
    else:
        image = image.convert(mode)
    (tmp_path / "x.png").write_bytes(png_of(image, **options))
    pixels = np.asarray(open_image(str(tmp_path / "x.png")))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 200).all()


def raw_png(depth, color_type, row, transparent, width):
    """A PNG of one row; Pillow writes none of the rarer kinds."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


GREY, RGB = 0, 2


@pytest.mark.parametrize(
    ("png", "expected"),
    [
        (raw_png(1, GREY, bytes([0b01000000]), struct.pack(">H", 0), 2), [255, 255]),
        (raw_png(2, GREY, bytes([0b00011011]), struct.pack(">H", 1), 4), [0, 255, 170, 255]),
        (raw_png(4, GREY, bytes([0x5A]), struct.pack(">H", 5), 2), [255, 170]),
        (raw_png(8, GREY, bytes([5, 10]), struct.pack(">H", 5), 2), [255, 10]),
        (raw_png(16, GREY, struct.pack(">3H", 1000, 1001, 40000), struct.pack(">H", 1000), 3), [255, 4, 156]),
        (
            raw_png(16, RGB, struct.pack(">6H", *[1000] * 3, *[40000] * 3), struct.pack(">3H", *[1000] * 3), 2),
            [255, 156],
        ),
    ],
    ids=["1-bit", "2-bit", "4-bit", "8-bit", "16-bit", "16-bit RGB"],
)
def test_a_transparent_colour_becomes_white_at_every_depth(tmp_path, png, expected):
    (tmp_path / "x.png").write_bytes(png)
    pixels = np.asarray(open_image(str(tmp_path / "x.png")))
    assert pixels[0].tolist() == [[value] * 3 for value in expected]


def test_values_of_unknown_range_are_refused(tmp_path):
    for name, values in (("float", np.ones((4, 4), np.float32)), ("int", np.ones((4, 4), np.int32))):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with pytest.raises(UnreadableImage, match=rf"{name}\.tif' cannot be read: it has 32 bits per channel"):
            open_image(str(tmp_path / f"{name}.tif"))
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "x.tif")
    (tmp_path / "x.pgm").write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    for extension in ("tif", "pgm"):
        expected = np.rint(values / 257).astype(np.uint8)
        np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / f"x.{extension}")))[..., 0], expected)


def kinds_of_images():
    """mode -> (image, extension, options to save it with), of two odd sides."""
    rgb = gradient(131, 87)
    alpha = Image.fromarray((np.arange(131 * 87) % 256).astype(np.uint8).reshape(87, 131))
    rgba, grey, la = rgb.copy(), rgb.convert("L"), rgb.convert("LA")
    rgba.putalpha(alpha), la.putalpha(alpha)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 250)
    return {
        "RGB": (rgb, "png", {}),
        "RGBA": (rgba, "png", {}),
        "L": (grey, "png", {}),
        "LA": (la, "png", {}),
        "1": (grey.convert("1"), "png", {}),
        "P": (rgb.quantize(32), "png", {"transparency": 3}),
        "RGB with a transparent colour": (rgb.quantize(8).convert("RGB"), "png", {"transparency": (0, 0, 0)}),
        "I;16": (deep, "png", {}),
        "CMYK": (rgb.convert("CMYK"), "jpg", {}),
    }


@pytest.mark.parametrize("kind", kinds_of_images())
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_image_has_the_pixels_of_any_other(tmp_path, monkeypatch, kind, orientation):
    """Those that are read channel by channel, in strips: one row at a time here."""
    image, extension, options = kinds_of_images()[kind]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = str(tmp_path / f"x.{extension}")
    image.save(path, exif=exif, **options)
    rng = random.Random(0)

    def read():
        rng.seed(0)
        crops = [training_data.read_augmented(path, 8, True, True, rng) for _ in range(4)]
        return [read_image(path, size) for size in (8, 21, 43, 44, 60)] + crops

    expected = read()
    halved = []
    real = image_io._halved_rgb
    monkeypatch.setattr(image_io, "_halved_rgb", lambda *args: halved.append(1) or real(*args))
    monkeypatch.setattr(image_io, "LARGE", 0)
    monkeypatch.setattr(image_io, "LARGE_FILE", 0)
    monkeypatch.setattr(image_io, "STRIP", 1)
    for found, same in zip(read(), expected, strict=True):
        np.testing.assert_array_equal(found, same)
    assert len(halved) == 3 + 4


LARGEST = {
    "rgba.png": "Image.new('RGBA', (n, n), (9, 99, 199, 128)).save(path, compress_level=1)",
    "turned.jpg": "exif = Image.Exif(); exif[0x112] = 6; Image.new('RGB', (n, n), (9, 99, 199)).save(path, exif=exif)",
}


@pytest.mark.parametrize("name", LARGEST)
def test_a_picture_of_169_million_pixels_takes_less_than_1_2_gb(tmp_path, name):
    """In a process of its own, whose greatest resident size the kernel knows (that of rusage may be the parent's)."""
    path = tmp_path / name
    code = "import sys; from PIL import Image; n, path = 13000, sys.argv[1]\n" + LARGEST[name]
    subprocess.run([sys.executable, "-c", code, path], check=True)
    code = (
        "import re, sys\n"
        "from guided_diffusion.images.io import read_image\n"
        "pixels = read_image(sys.argv[1], 256)\n"
        "kib = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(pixels.shape, pixels[0, 0].tolist(), kib)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    shape, color, kib = re.fullmatch(r"(\(.*\)) \[(.*)\] (\d+)\n", done.stdout).groups()
    assert shape == "(256, 256, 3)"
    expected = [132, 177, 227] if name == "rgba.png" else [9, 99, 199]
    assert np.abs(np.array(color.split(", "), int) - expected).max() <= 1
    assert int(kib) * 1024 < 1.2e9


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 100, 51)).save(tmp_path / "x.webp", lossless=True)
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / "x.webp")))[0, 0], [204, 204, 224])


def corrupt_exif_jpeg():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    file = io.BytesIO()
    gradient().save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest sets aside the filter of the module
@pytest.mark.parametrize("damage", ["header", "offset", "cut"])
def test_corrupt_exif_does_not_fail_the_image(tmp_path, damage):
    data = bytearray(corrupt_exif_jpeg())
    tiff = data.index(b"Exif\0\0") + 6
    if damage == "header":
        data[tiff : tiff + 4] = b"\x00\x01\x02\x03"
    elif damage == "offset":
        data[tiff + 4 : tiff + 8] = b"\xff\xff\xff\x7f"
    else:
        data[tiff + 8 : tiff + 10] = b"\xff\xff"
    (tmp_path / "x.jpg").write_bytes(data)
    assert {*open_image(str(tmp_path / "x.jpg")).size} == {40, 30}


def unreadable(tmp_path):
    """name -> (bytes or None, part of the reason)."""
    jpeg, png = CAT.read_bytes(), png_of(gradient())
    bomb = Image.new("1", (20000, 20000))
    return {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut_in_the_header.jpg": (jpeg[:100], ""),
        "cut.png": (png[: len(png) // 2], ""),
        "damaged.png": (png[:60] + b"\0\0\0\0" + png[64:], ""),
        "text.jpg": (b"not an image", "it is not one of JPEG, PNG"),
        "page.png": (b"<!DOCTYPE html><html></html>", "it is not one of JPEG, PNG"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not one of JPEG, PNG"),
        "empty.jpg": (b"", "it is not one of JPEG, PNG"),
        "bomb.png": (png_of(bomb), "it has more than 178,956,970 pixels; make it smaller"),
        "missing.jpg": (None, "No such file or directory"),
    }


def test_an_elongated_image_is_unreadable_instead_of_taking_all_memory(tmp_path):
    """Scaled to a short side of 256, it would take 12 GB."""
    path = str(tmp_path / "thin.png")
    Image.new("RGB", (1, 60000)).save(path)
    for read in (read_image, lambda path, size: training_data.read_augmented(path, size, True, True, random.Random(0))):
        with pytest.raises(UnreadableImage, match=r"thin\.png' cannot be read: it has 1x60000 pixels, and would have"):
            read(path, 256)
    Image.new("RGB", (2, 2000)).save(path)
    assert read_image(path, 256).shape == (256, 256, 3)


def test_unreadable_files_say_which_and_why(tmp_path):
    for name, (data, reason) in unreadable(tmp_path).items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableImage) as error:
            read_image(str(tmp_path / name), 64)
        message = str(error.value)
        assert repr(str(tmp_path / name)) in message and reason in message
        assert message.count("\n") == 0 and not message.endswith(": ")


def test_reading_damaged_files_prints_nothing(tmp_path):
    files = {name: data for name, (data, _) in unreadable(tmp_path).items() if data is not None}
    exif = bytearray(corrupt_exif_jpeg())
    exif[exif.index(b"Exif\0\0") + 14 :][:2] = b"\xff\xff"
    files["exif.jpg"] = bytes(exif)
    files["large.png"] = png_of(Image.new("1", (10000, 10000)))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import os, sys\n"
        "from guided_diffusion.images.io import open_image, UnreadableImage\n"
        "for name in sorted(os.listdir(sys.argv[1])):\n"
        "    try: open_image(os.path.join(sys.argv[1], name))\n"
        "    except UnreadableImage: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_cut_of_a_file_is_read_or_named(tmp_path):
    data = corrupt_exif_jpeg()
    file = tmp_path / "x.jpg"
    unreadable_lengths = []
    for length in range(len(data) + 1):
        file.write_bytes(data[:length])
        try:
            assert read_image(str(file), 16).shape == (16, 16, 3)
        except UnreadableImage:
            unreadable_lengths.append(length)
    # The last bytes are an end mark and padding, which can be done without.
    assert unreadable_lengths == list(range(len(unreadable_lengths))) and len(data) - len(unreadable_lengths) < 10


def test_to_float_maps_bytes_to_minus_one_and_one():
    values = to_float(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[255] == 1
    np.testing.assert_array_equal(np.rint((values + 1) * 127.5), np.arange(256))


def test_random_crop_stays_within_its_bounds():
    # Every pixel holds its own column, so that the crop's first and last show how much of the width it covers.
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    rng = random.Random(0)
    crops = [random_crop_arr(image, 64, rng=rng).astype(int) for _ in range(200)]
    assert {crop.shape for crop in crops} == {(64, 64)}
    covered = np.array([crop[32, -1] - crop[32, 0] for crop in crops]) / 256
    assert 0.75 < covered.min() < 0.81 and 0.95 < covered.max() < 1
    assert len({crop[32, 0] for crop in crops}) > 20
    again = random_crop_arr(image, 64, rng=random.Random(0))
    np.testing.assert_array_equal(again, crops[0])


# Training: see test_training_data.py


def test_a_folder_is_needed():
    code = "from guided_diffusion.image_datasets import load_data; load_data(data_dir='', batch_size=1, image_size=8)"
    done = run_python("-c", code)
    assert done.stderr.endswith("UserError: no folder of images was given: --data_dir\n")
