"""Who wrote a cache. Checksums in it are against damage, not against somebody who can write them too.

What is read again, base responses, log-probs of the reference and prepared rows, decides what is trained. So it is taken only
where it belongs to the user, root, or somebody the user names. Group members are not strangers: who lets a group
write has chosen to share. root isn't asked, since in a container it reads the files of the user outside. What everybody can
write is only said: on file systems that know no permissions, as Windows' disks and some volumes of rented machines, all is so.
"""

import os
import stat
from functools import cache
from pathlib import Path

#: names or ids of users, with commas; * for all
SETTING = "BAPO_TRUSTED_USERS"


def refuse_strangers(*paths: Path) -> None:
    """Stop before a cache is read that somebody else has written; warn of one that everybody can write.

    Args:
        paths: files, folders with all that is in them, and what isn't there yet. Of the folder around each it counts
            whether everybody may exchange files in it.

    Raises:
        ValueError: one belongs to another user; names the setting that allows it.
    """
    trusted = {name.strip() for name in os.environ.get(SETTING, "").split(",")}
    if "*" in trusted or not hasattr(os, "geteuid"):
        return
    me = os.geteuid()
    for path in paths:
        for found in (path.parent, path, *(path.rglob("*") if path.is_dir() else ())):
            try:
                state = found.stat()
            except FileNotFoundError:
                continue
            everybody = state.st_mode & stat.S_IWOTH
            if everybody and not (stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX):
                _tell(path.parent)
            if found == path.parent or me == 0 or state.st_uid in (me, 0):
                continue
            owner = _name(state.st_uid)
            if not trusted & {owner, str(state.st_uid)}:
                raise ValueError(
                    f"{found} belongs to the user {owner}, and what is in it decides what is trained. Set the environment "
                    f"variable {SETTING}={owner} if you trust them (several with commas, * for all), or name another "
                    "dataset_prepared_path"
                )


@cache  # once
def _tell(folder: Path) -> None:
    from axolotl.utils.logging import get_logger  # not light

    get_logger("axolotl." + __name__).warning(
        f"{folder} can be written by every user of this machine, and what is in it decides what is trained. If others use the "
        f"machine, take that away (chmod -R o-w {folder}); if all are trusted, set the environment variable {SETTING}=*"
    )


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
