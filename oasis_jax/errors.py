"""What is told of an error that others have raised."""


def first_line(error: BaseException) -> str:
    """Of its message, which may run to pages.

    >>> first_line(ValueError("wrong\\nand more"))
    'wrong'
    """
    return (str(error).strip() or "no details").splitlines()[0][:200]
