"""The root scripts as modules: a wheel has them in this folder, a checkout two levels above."""
import os

_folder = os.path.dirname(os.path.abspath(__file__))
if not os.path.exists(os.path.join(_folder, 'train.py')):
    __path__.append(os.path.dirname(os.path.dirname(_folder)))
