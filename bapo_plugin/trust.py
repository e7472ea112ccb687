"""Who wrote a cache. Checksums in it are against damage, not against somebody who can write them too.

What is read again, base responses, log-probs of the reference and prepared rows, decides what is trained. So it is taken only
where the user, root, or somebody the user names could have written it. Group members are not strangers: who lets a group
write has chosen to share. root isn't asked, since in a container it reads the files of the user outside.
"""

import os
import stat
from pathlib import Path

#: names or ids of users, with commas; * for all
SETTING = "BAPO_TRUSTED_USERS"


def refuse_strangers(*paths: Path) -> None:
    """Stop before a cache is read that somebody else could have written.

    Args:
        paths: files, folders with all that is in them, and what isn't there yet. Of the folder around each it counts
            whether everybody may exchange files in it.

    Raises:
        ValueError: one belongs to another user, or everybody may write it; names the setting that allows it.
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
                raise ValueError(
                    f"{found} can be written by every user of this machine, and what is in it decides what is trained. Take "
                    f"that away (chmod o-w {found}), name another dataset_prepared_path, or set the environment variable "
                    f"{SETTING}=* if all are trusted"
                )
            if found == path.parent or me == 0 or state.st_uid in (me, 0):
                continue
            owner = _name(state.st_uid)
            if not trusted & {owner, str(state.st_uid)}:
                raise ValueError(
                    f"{found} belongs to the user {owner}, and what is in it decides what is trained. Set the environment "
                    f"variable {SETTING}={owner} if you trust them (several with commas, * for all), or name another "
                    "dataset_prepared_path"
                )


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
