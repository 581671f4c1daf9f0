"""The command that computes and plots the theory: its files, its mistakes, and what it measures."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guided_diffusion.classifier.figures import style, to_csv
from guided_diffusion.correlations import correlation_function, covariances
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import ModelMeanType
from random_hierarchy_model import Grammar, mean_field, theory, theory_plots, theory_tables
from random_hierarchy_model.belief_propagation import infer
from random_hierarchy_model.leaf_noise import epsilon_log_likelihoods

import numpy as np
import pytest
import torch
from conftest import load_script, run_script
from figure_texts import check_texts
from matplotlib.text import Text

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = "scripts/theory_figures.py"
NUMBERS = ["--num_grammars", "2", "--num_samples", "3", "--num_images", "2"]
SMALL = [*NUMBERS, "--num_symbols", "8", "--num_synonyms", "3", "--depth", "3"]
COLUMNS = {
    "levels_epsilon": "v,m,s,depth,epsilon,level,exact,exact_error,mean_field",
    "levels_gaussian": "v,m,s,depth,time,level,exact,exact_error,loop_exact,loop,loop_error",
    "levels_masking": "v,m,s,depth,masked,level,exact,exact_error",
    "map": "m,p,F",
    "fixed_points": "v,m,s,slope_at_one,slope_at_chance,p_star,epsilon_star,slope_at_p_star,nu",
    "phase_diagram": "v,s,m,sf,epsilon,exact,exact_error,mean_field",
    "depth": "process,v,m,s,depth,noise,exact,exact_error",
    "correlations": "v,m,s,depth,epsilon,level_of_ancestor,r,exact,exact_error,mean_field",
    "susceptibility": "process,v,m,s,depth,noise,exact,exact_error,mean_field",
    "steps": "sampler,v,m,s,depth,steps,time,level,loop,exact,difference,difference_error",
}


def parts(v: int, m: int, s: int, depth: int, grammars: int, data: int = 1) -> list[theory.Part]:
    return [theory.Part(Grammar(v, s, depth, m, i), i * data, data, 0) for i in range(grammars)]


def measured(function, of: list[theory.Part], *arguments) -> tuple[np.ndarray, np.ndarray]:
    """The mean over grammars and its standard error."""
    return theory.mean_and_error(np.stack([function(part, *arguments) for part in of]))


# The command


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """All figures of little data, by one thread."""
    folder = tmp_path_factory.mktemp("theory")
    done = run_script(*SMALL, "--quick", "--num_threads", "1", "--output", folder, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_files_and_columns(made):
    figures = set(COLUMNS) - {"fixed_points"}
    expected = {f"{name}.{ending}" for name in figures for ending in ("png", "pdf", "csv")} | {"fixed_points.csv"}
    assert {path.name for path in made.iterdir()} == expected
    for name, columns in COLUMNS.items():
        assert (made / f"{name}.csv").read_text().splitlines()[0] == columns
        for row in rows_of(made / f"{name}.csv"):
            for column, value in row.items():
                if value and column not in ("sampler", "process"):
                    assert value in (str(float(f"{float(value):.6g}")), str(int(float(value)))), f"{name}: {column}"
    for pdf in made.glob("*.pdf"):
        assert b"CreationDate" not in pdf.read_bytes()


def test_two_threads_write_the_same_files(made, tmp_path, monkeypatch):
    script = load_script(SCRIPT)
    flags = [*SMALL, "--quick", "--num_threads", "2", "--output", str(tmp_path)]
    assert script.main([*flags, "--figures", "depth"]) == 0
    for ending in ("png", "pdf"):
        assert (tmp_path / f"depth.{ending}").read_bytes() == (made / f"depth.{ending}").read_bytes()
    monkeypatch.setattr(script, "render", lambda name, _, rows: {f"{name}.csv": to_csv(rows)})  # the rest is not drawn
    assert script.main(flags) == 0
    for path in made.glob("*.csv"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_what_the_figures_cover(made):
    assert {(row["process"], bool(row["mean_field"])) for row in rows_of(made / "susceptibility.csv")} == {
        ("epsilon", True),
        ("masking", False),
    }
    assert {int(row["level"]) for row in rows_of(made / "levels_epsilon.csv")} == {0, 1, 2, 3}
    assert {(row["v"], row["level"]) for row in rows_of(made / "steps.csv")} == {("8", "0"), ("8", "4"), ("8", "3")}
    steps = rows_of(made / "steps.csv")
    for sampler, counts in (("ddpm", "250 100 50 25 12"), ("ddim", "50 25 12"), ("sde-dpmsolver++", "100 50 25 12")):
        assert list(dict.fromkeys(row["steps"] for row in steps if row["sampler"] == sampler)) == counts.split()
    assert [row["r"] for row in rows_of(made / "correlations.csv")][:4] == ["0", "1", "3", "7"]
    fixed = {(row["v"], row["m"], row["s"]): row for row in rows_of(made / "fixed_points.csv")}
    assert float(fixed["32", "8", "2"]["nu"]) == pytest.approx(1.893, abs=5e-4)
    for without in (("32", "17", "2"), ("8", "2", "4")):
        assert {fixed[without][name] for name in ("p_star", "epsilon_star", "slope_at_p_star", "nu")} == {""}


def test_no_text_overlaps_or_leaves_the_figure(made):
    script = load_script(SCRIPT)
    for name, (_, draw) in script.FIGURES.items():
        rows = [
            {column: value if column in ("process", "sampler") else number(value) for column, value in row.items()}
            for row in rows_of(made / f"{name}.csv")
        ]
        with style():
            figure = draw(rows, Grammar(8, 2, 3, 3))
            check_texts(figure)
        if name.startswith("levels") or name in ("correlations", "susceptibility"):
            assert "$v=8$, $m=3$, $s=2$, $L=3$" in [text.get_text() for text in figure.findobj(Text)]
            assert {(row["v"], row["m"], row["s"], row["depth"]) for row in rows} == {(8, 3, 2, 3)}


def number(value: str) -> float | int | str:
    """A number in a CSV; "" if undefined."""
    return value and (int(value) if value.isdecimal() else float(value))


def test_a_grammar_without_a_transition_and_another_seed(tmp_path):
    """Only the figures asked for; without e*, nothing of it is drawn."""
    script = load_script(SCRIPT)
    names = "levels_epsilon", "correlations", "susceptibility"
    flags = [
        *NUMBERS,
        "--num_symbols",
        "4",
        "--num_synonyms",
        "2",
        "--branching",
        "3",
        "--depth",
        "2",
        "--num_data",
        "2",
    ]
    for seed in ("0", "1"):
        output = tmp_path / seed
        assert script.main([*flags, "--seed", seed, "--figures", *names, "--output", str(output)]) == 0
        assert {path.stem for path in output.iterdir()} == set(names)
    first, second = (rows_of(tmp_path / seed / "levels_epsilon.csv") for seed in ("0", "1"))
    assert [row["mean_field"] for row in first] == [row["mean_field"] for row in second]
    assert [row["exact"] for row in first] != [row["exact"] for row in second]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_symbols", "4", "--num_synonyms", "5"], "v = 4 symbols have 16 tuples of s = 2, too few for m = 5"),
        (["--branching", "1"], "branching s = 1: expected v >= 2, m >= 1, s >= 2"),
        (["--num_grammars", "1", "--num_data", "1"], "one datum has no standard error, expected 2 or more"),
        (["--depth", "30"], "choose a smaller --depth"),
        (["--depth", "0"], "argument --depth: expected a whole number >= 1, not 0"),
        (["--num_samples", "1"], "argument --num_samples: expected a whole number >= 2, not 1"),
        (["--figures", "levels"], "argument --figures: invalid choice: 'levels'"),
    ],
)
def test_mistakes(tmp_path, capsys, flags, words):
    script = load_script(SCRIPT)
    output = tmp_path / "none"
    with pytest.raises((UserError, SystemExit)) as raised:
        script.main([*flags, "--output", str(output)])
    said = capsys.readouterr().err if isinstance(raised.value, SystemExit) else str(raised.value)
    assert words in said and len(said.strip().splitlines()) == 1
    assert not output.exists()


def test_mistakes_end_with_a_line(tmp_path):
    done = run_script("--branching", "1", "--output", tmp_path, script=SCRIPT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: mean-field theory of v = 32") and done.stderr.count("\n") == 1


@pytest.fixture
def work():
    """Of four grammars."""
    with ThreadPoolExecutor(1) as pool:
        yield theory_tables.Work(pool, 0, num_grammars=4, num_data=1, num_samples=2, num_images=1)


def test_noises_at_which_the_class_is_lost(work):
    """Those of the paper's grammar are fixed; the others' follow from where their class is lost."""
    paper = Grammar(32, 2, 10, 8)
    assert theory_tables.times(work, paper) == theory_tables.TIMES
    near = 0.64, 0.66, 0.68, 0.7, 0.72, 0.74, 0.76, 0.78, 0.8, 0.82, 0.84
    assert theory_tables.epsilons(paper) == (0.4, 0.5, 0.6, *near, 0.9, 1)
    for v, m, s, depth in ((8, 2, 4, 4), (32, 1, 2, 6), (4, 5, 4, 3)):
        exact, _ = measured(
            theory.marginals, parts(v, m, s, depth, 8), "gaussian", theory_tables.times(work, Grammar(v, s, depth, m))
        )
        noises = theory_tables.epsilons(Grammar(v, s, depth, m))
        theoretical = [mean_field.marginals(e, v, m, s, depth)[-1] for e in noises if e < 1]
        for classes in (exact[:, -1], theoretical):
            survives = (np.array(classes) - 1 / v) / (1 - 1 / v)
            assert survives[0] > 0.9 and survives[-1] < 0.3
            assert (np.abs(survives - 0.5) < 0.45).sum() >= 2  # on the way down


def test_errors_of_the_loop_where_all_outcomes_are_equal(work):
    """There, what the exact posterior expects; elsewhere, the standard error of the difference from it."""
    rows = theory_tables.levels_gaussian(work, Grammar(8, 2, 2, 3))
    unanimous = [row for row in rows if row["loop"] in (0, 1) and 1e-6 < row["loop_exact"] < 1 - 1e-6]
    assert unanimous
    for row in unanimous:
        expected = (row["loop_exact"] * (1 - row["loop_exact"]) / 2) ** 0.5  # two data
        assert row["loop_error"] == pytest.approx(expected)
    assert any(row["loop_exact"] != row["exact"] for row in rows)  # of fewer grammars


def test_figures_of_what_is_undefined_and_of_one_level():
    about = {"v": 32, "m": 8, "s": 2, "depth": 1}
    found = {"exact": "", "exact_error": "", "mean_field": 1.0}
    chi = [{"process": p, **about, "noise": e, **found} for p in ("epsilon", "masking") for e in (0.2, 0.5, 0.8)]
    epsilons, of_level = (0.5, 0.7, 0.74, 0.8), {"exact": 0.4, "exact_error": 0.01, "mean_field": 0.4}
    by_level = [
        {**about, "epsilon": e, "level_of_ancestor": h, "r": 2**h - 1, **of_level} for e in epsilons for h in (0, 1)
    ]
    with style():
        figure = theory_plots.susceptibility(chi, Grammar(32, 2, 1, 8))
        assert [axes.get_xlim() for axes in figure.axes] == [pytest.approx((0.17, 0.83))] * 2
        figure = theory_plots.correlations(by_level, Grammar(32, 2, 1, 8))
        check_texts(figure)
    assert len(figure.axes) == 1
    assert "mean field" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


# What it measures


@pytest.mark.parametrize(("depth", "grammars"), [(7, 200), (10, 100)])
def test_mean_field_against_exact(depth, grammars):
    """Within 0.01 away from e*, and 0.05 near it, where exact is higher: the mean field neglects fluctuations."""
    v, m, s = 32, 8, 2
    critical = mean_field.critical_noise(v, m, s)
    noises = (0.5, 0.6, 0.67, 0.72, 0.74, 0.8, 0.9)
    exact, error = measured(theory.marginals, parts(v, m, s, depth, grammars), "epsilon", noises)
    theoretical = np.array([mean_field.marginals(e, v, m, s, depth) for e in noises])
    far = np.abs(np.array(noises) - critical) > 0.05
    deviation = exact - theoretical
    assert (np.abs(deviation[far]) < np.maximum(0.01, 3 * error[far])).all()
    assert (np.abs(deviation[~far]) < 0.05).all()
    assert deviation[~far][:, 3:].mean() > 0


def test_exact_marginals_of_the_reference():
    """v = 32, m = 8, s = 2, L = 7, from leaf to class: averages of 16 data of each of 3 grammars."""
    at = {
        0.7: [0.869, 0.876, 0.880, 0.876, 0.861, 0.827, 0.767, 0.650],
        0.8: [0.441, 0.357, 0.266, 0.181, 0.112, 0.065, 0.045, 0.034],
    }
    of = parts(32, 8, 2, 7, grammars=100, data=16)
    exact, error = measured(theory.marginals, of, "epsilon", tuple(at))
    of_three = error * (100 / 3) ** 0.5
    assert (np.abs(exact - list(at.values())) < 3 * np.hypot(error, of_three)).all()


def test_masking_of_the_reference():
    """v = 32, m = 8, s = 2, L = 10: leaves and class, whose standard error is 0.02."""
    exact, error = measured(theory.marginals, parts(32, 8, 2, 10, 60), "masking", (0.20, 0.25, 0.30, 0.35))
    classes = [0.942, 0.723, 0.247, 0.057]
    assert (np.abs(exact[:, -1] - classes) < 3 * np.hypot(error[:, -1], 0.02)).all()
    assert exact[:, 0] == pytest.approx([0.925, 0.884, 0.829, 0.767], abs=0.01)


@pytest.mark.parametrize(
    ("depth", "classes"), [(4, [0.98, 0.81, 0.42, 0.15, 0.06]), (8, [1.00, 0.95, 0.25, 0.03, 0.03])]
)
def test_gaussian_noise_of_the_reference(depth, classes):
    exact, error = measured(theory.marginals, parts(32, 8, 2, depth, 100), "gaussian", (0.08, 0.10, 0.12, 0.14, 0.16))
    assert (np.abs(exact[:, -1] - classes) < 3 * np.hypot(error[:, -1], 0.02)).all()
    leaves = [1.00, 0.94, 0.76, 0.54, 0.37] if depth == 4 else [1.00, 0.97, 0.79, 0.54, 0.37]
    assert (np.abs(exact[:, 0] - leaves) < 3 * np.hypot(error[:, 0], 0.01)).all()


def test_the_bias_of_the_loop_falls_with_its_steps():
    """The loop keeps more leaves than the posterior, paired: with N = 1000 at most half as many more as with 250."""
    part = theory.Part(Grammar(8, 2, 3, 3), 0, 6000, 0)
    exact = theory.marginals(part, "gaussian", (0.12,))
    bias, error = {}, {}
    for steps in (250, 1000):
        difference = (theory.gaussian_loop(part, (0.12,), steps) - exact)[:, 0]
        bias[steps], error[steps] = theory.mean_and_error(difference[None])
    assert abs(bias[250][0]) < 0.02 and abs(bias[250][-1]) < 0.04
    assert bias[250][0] > 3 * error[250][0]
    assert bias[1000][0] < bias[250][0] / 2 + 2 * error[1000][0]


def test_chains_lead_from_a_timestep_to_clean_data():
    for last, steps in ((397, 100), (397, 5), (99, 25), (99, 1000), (36, 1), (0, 1)):
        diffusion = theory.chain(last, steps, ModelMeanType.EPSILON)
        assert diffusion.timestep_map[-1] == last and diffusion.num_timesteps == min(steps, last + 1)
        assert diffusion.alphas_cumprod[-1] == pytest.approx(theory.SIGNAL[last])
    with pytest.raises(UserError, match=r"^a chain of 0 steps from timestep 36: expected one step or more$"):
        theory.chain(36, 0, ModelMeanType.EPSILON)


def test_a_chain_of_one_step_returns_the_prediction():
    def half(x, t):
        assert (t == 36).all()
        return x / 2

    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    back = theory.denoise(theory.chain(36, 1, ModelMeanType.START_X), half, x, torch.Generator())
    assert (back - x / 2).abs().max() < 1e-6


def test_images_start_from_the_same_noise_for_any_number_of_steps():
    part = theory.Part(Grammar(4, 4, 2, 2), 0, 3, 0)
    many, few = (theory.image_loop(part, 1, 10, 20, steps) for steps in (20, 5))
    other = theory.image_loop(part, 1, 10, 20, 20, "sde-dpmsolver++")
    assert many.shape == (3, 2, 3) and (many[:, 1] == few[:, 1]).all() and (many[:, 1] == other[:, 1]).all()
    assert (many[:, 0] != other[:, 0]).any()
    assert (theory.image_loop(part, 1, 12, 20, 20)[:, 1] != many[:, 1]).any()


@pytest.mark.parametrize("process", ["epsilon", "masking"])
def test_variances_by_level_are_sums_of_covariances(process):
    """Against the matrix of covariances of the same samples."""
    g = Grammar(4, 3, 2, 3)
    part = theory.Part(g, 5, 2, 1)
    found = theory.variances_by_level(part, process, (0.6,), 7)  # (2, 1, 3)
    leaves = part.derivations()[0]
    drawn = theory.SAMPLERS[process](g, leaves, 0.6, 7, part.generator(f"changes {process} 0.6"))
    covariance = covariances(torch.where(drawn == leaves[:, None], -1.0, 1.0).double().numpy())
    levels = g.ancestor_levels()
    for h in range(3):
        assert found[:, 0, h] == pytest.approx(covariance[:, levels <= h].sum(1))
    by_level = correlation_function(covariance, levels)[1].mean(0)
    relative, error = theory.correlation_by_level(found[:, 0][None], 3)
    assert relative == pytest.approx(by_level / by_level[0]) and (error[1:] > 0).all()
    chi, _ = theory.susceptibility(found[None])
    assert chi == pytest.approx(covariance.sum() / np.trace(covariance.sum(0)))


def test_samples_of_one_datum_have_its_marginals():
    g, count = Grammar(3, 2, 3, 2), 4000
    leaves = torch.from_numpy(g.sample(2, 0)[0])
    posterior = infer(g, epsilon_log_likelihoods(leaves, 0.7, 3))
    drawn = posterior.samples(torch.Generator().manual_seed(0), count)
    for symbols, marginals in zip(drawn, posterior.marginals(), strict=True):
        frequency = torch.nn.functional.one_hot(symbols, 3).double().mean(1)  # (2, nodes, 3)
        error = (marginals * (1 - marginals) / count).sqrt()
        assert ((frequency - marginals).abs() < 4.5 * error + 1e-12).all()
    assert (drawn[0][:, 0] != drawn[0][:, 1]).any()
    again = posterior.sample(torch.Generator().manual_seed(1))
    for one, several in zip(again, posterior.samples(torch.Generator().manual_seed(1), 1), strict=True):
        assert (one == several[:, 0]).all()


def test_nothing_that_changes():
    """Without noise no leaf changes: correlations are undefined, and empty in the CSV."""
    variances = np.zeros((3, 1, 2, 4))
    variances[:, :, 1] = [1, 2, 3, 4]
    assert np.isnan(theory.susceptibility(variances)).tolist() == [[True, False], [True, False]]
    assert np.isnan(theory.correlation_by_level(variances[:, :, 0], 2)).all()
    assert theory.correlation_by_level(variances[:, :, 1], 2)[0] == pytest.approx([1, 1, 0.5, 0.25])


def test_errors_are_over_grammars_or_over_the_data_of_one():
    values = np.random.default_rng(0).normal(size=(5, 4, 2))
    mean, error = theory.mean_and_error(values)
    assert mean == pytest.approx(values.mean((0, 1)))
    assert error == pytest.approx(values.mean(1).std(0, ddof=1) / 5**0.5)
    mean, error = theory.mean_and_error(values[:1])
    assert error == pytest.approx(values[0].std(0, ddof=1) / 2)
