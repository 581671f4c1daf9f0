"""Image classifiers by name, under the released experiment's name of the module: see `classifier.networks`."""

from .classifier.networks import Classifier as Classifier
from .classifier.networks import load_classifier as load_classifier
from .classifier.networks import open_classifier as open_classifier
