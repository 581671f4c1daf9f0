from setuptools import find_packages, setup

setup(
    name="forward-backward-diffusion",
    version="0.1.0",
    description="Forward-backward diffusion experiments: noise an image, denoise it back, measure what survived",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["guided_diffusion*", "random_hierarchy_model*"]),
    package_data={"random_hierarchy_model": ["*.pt"]},
    install_requires=["torch>=2.6", "torchvision", "numpy", "blobfile", "mpi4py>=4", "pillow>=10.1", "tqdm"],
    extras_require={
        "test": ["pytest", "pytest-xdist", "ruff", "matplotlib", "scipy>=1.15", "safetensors", "setuptools>=70.1"],
        "figures": ["matplotlib", "scipy>=1.15"],
        "safetensors": ["safetensors"],  # for checkpoints in that format
        "clip": ["open_clip_torch>=3"],  # for change_correlations.py --tokens clip
        "bench": ["diffusers"],  # what scripts/benchmark.py compares with
        "mpi": ["openmpi"],  # an MPI library and its mpiexec, for machines that have none
    },
)
