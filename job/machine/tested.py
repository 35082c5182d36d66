"""The versions that this project was tested with. Written by `make lock`, from container/constraints.txt."""

TESTED = {
    "boto3": "1.44.8",
    "botocore": "1.44.8",
    "click": "8.5.1",
    "jinja2": "3.1.6",
    "markupsafe": "3.0.4",
    "matplotlib": "3.11.2",
    "numpy": "2.4.6",
    "pydantic": "2.14.3",
    "pyyaml": "6.0.3",
    "safetensors": "0.8.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
    "soundfile": "0.14.0",
    "soxr": "1.1.0",
    "timm": "1.0.31",
    "torch": "2.13.0",
    "tqdm": "4.70.1",
}
