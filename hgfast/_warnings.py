"""The one category of hgfast's warnings: filter it to silence or to raise all of them."""


class HgfastWarning(UserWarning):
    """hgfast runs, but not as asked: slower, eagerly, or with a part left out."""
