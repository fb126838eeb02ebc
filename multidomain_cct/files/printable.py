"""Names that anybody may have chosen, made fit to be shown."""


def printable(text: str) -> str:
    r"""The text with line breaks, other control characters and lone surrogates written out, such as \x07: what is shown
    cannot steer a terminal.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
