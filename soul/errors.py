"""The one exception that a person's mistake can raise."""


class UserError(Exception):
    """Something the person can fix: what was wrong, where (file:line, row, key), and what to do.

    The front door prints `str(error)` as one line and exits with code 2; nothing else in soulsmith prints it.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where is not None else what
        if fix:
            text = f"{text.rstrip('.')}. {fix}"
        super().__init__(" ".join(text.split()))
