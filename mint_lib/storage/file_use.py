"""Which files of removed versions are still in use, by later versions of the same name.

Goes in: a version whose manifest is empty. Comes out: the objects in its folder that nobody uses. It removes nothing.
"""

import logging

from mint_lib.errors import IntegrityError, NotFound
from mint_lib.storage.client import S3, StoredObject
from mint_lib.storage.layout import Layout
from mint_lib.storage.manifest import CLAIM, MANIFEST, Manifest

logger = logging.getLogger(__name__)


class FileUse:
    """What the versions of one name use of each other; each is asked once, however many are swept.

    An answer that has grown old is a safe one. A version that stood when it was asked speaks for all that hold it, and
    one that was removed never stands again.
    """

    def __init__(self, s3: S3, layout: Layout, kind: str, name: str):
        self._s3 = s3
        self._layout = layout
        self._place = (kind, name)
        self._manifests: dict[str, Manifest | None] = {}
        self._holders: dict[str, set[str]] = {}

    def list_unused(self, version: str) -> list[StoredObject]:
        """Files that no other version uses, of a version whose manifest is empty; its claim and its holds stay.

        None is unused while it is not known what a holder uses.
        """
        try:
            used = self._find_used(version)
        except (NotFound, IntegrityError) as error:
            logger.info("%s/%s@%s stays as it is: %s", *self._place, version, error)
            return []
        folder = self._layout.folder(*self._place, version)
        kept = {folder + path for path in (MANIFEST, CLAIM, *used)}
        holds = self._layout.hold(*self._place, version)
        return [
            item for item in self._s3.list_objects(folder) if item.key not in kept and not item.key.startswith(holds)
        ]

    def _find_used(self, version: str) -> set[str]:
        """Paths of a removed version's files that others use; raises if a holder's manifest is missing or damaged.

        A holder that stands speaks for all that were built on it: what they use of this version, they have from it. One
        that was removed does not, so those that hold it are asked.
        """
        used: set[str] = set()
        removed, asked = [version], {version}
        while removed:
            for holder in self._list_holders(removed.pop()) - asked:
                asked.add(holder)
                manifest = self._read_manifest(holder)
                if manifest is None:
                    removed.append(holder)
                    continue
                entries = manifest.files.items()
                used |= {entry.stored_as or path for path, entry in entries if entry.stored_in == version}
        return used

    def _list_holders(self, version: str) -> set[str]:
        """The versions that say in `version`, whose manifest was found empty before, that they use its files.

        So the list is whole: a writer puts its hold before it looks whether its base still stands.
        """
        if version not in self._holders:
            holds = self._layout.hold(*self._place, version)
            found = {item.key.removeprefix(holds).removesuffix(".json") for item in self._s3.list_objects(holds)}
            self._holders[version] = found
        return self._holders[version]

    def _read_manifest(self, version: str) -> Manifest | None:
        """None: it is empty."""
        if version not in self._manifests:
            key = self._layout.manifest(*self._place, version)
            data, _ = self._s3.get(key)
            self._manifests[version] = Manifest.parse(data, where=self._s3.locate(key)) if data else None
        return self._manifests[version]
