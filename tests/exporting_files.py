"""Files of small patched models, for the tests of `evopatch.export`."""

import pytest
import variants
from matrix import patched, shallow_config

import evopatch
from evopatch.deployment import exporting

ENDINGS = {name: form.ending for name, form in exporting.FORMS.items()}
ONE_BATCH = {"executorch", "coreml"}


def small(name="vit", **options):
    return patched(name, shallow_config(name), **variants.shallow(name), **options)


def export_of(model, form, folder, images=None, **settings):
    shown = variants.images(4) if images is None else images
    return evopatch.export(model, folder / f"m{ENDINGS[form]}", form, images=shown, **settings)


def needs(form):
    for package in exporting.FORMS[form].packages:
        pytest.importorskip(package)
