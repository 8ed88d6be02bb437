"""What an exported ONNX file says about itself, in its ``metadata_props``. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ivdr_deploy._text import reason_of
from ivdr_deploy.artifacts import former
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.records import from_dict, parse_json, require_plain, to_dict
from ivdr_deploy.spec import FORMAT_VERSION, ClipSpec, Precision, ViewPlan, canonical_json, require_outputs

_PREFIX = "ivdr."


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxMetadata:
    """Enough to use the file without its bundle."""

    format_version: int = FORMAT_VERSION
    name: str
    version: str
    contract_hash: str
    contract: ClipSpec
    view_plan: ViewPlan
    labels: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: Precision | None = None
    """That it computes in; None in files of before, which do not say."""

    instruction_set: str = ""
    """Of the CPU that it needs to compute exactly; see ``manifest.Target``."""

    ivdr_version: str

    def __post_init__(self) -> None:
        require_plain("name", self.name)
        require_plain("version", self.version, self.ivdr_version)
        require_outputs(self.outputs)
        require_plain("instruction set", *filter(None, [self.instruction_set]))

    def to_props(self) -> dict[str, str]:
        """Return the key-value pairs to attach: texts as they are, everything else as canonical JSON."""
        return {
            _PREFIX + key: value if isinstance(value, str) else canonical_json(value)
            for key, value in to_dict(self).items()
            if value not in (None, "")
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str], *, where: str) -> OnnxMetadata:
        """Read the pairs back.

        Args:
            props: Of the whole file; pairs that are not ours are ignored.
            where: Name of the file, for error messages.

        Raises:
            ArtifactError: if the file was not made by ``ivdr export``, or its contract is not the one of its
                hash.
        """
        ours = {key.removeprefix(_PREFIX): value for key, value in props.items() if key.startswith(_PREFIX)}
        hint = (
            "some tools drop or change the metadata of an ONNX file; take the file that `ivdr export` wrote"
        )
        if not ours:
            raise ArtifactError(f"{where} carries no metadata of ivdr_deploy", hint=hint)
        texts = {"name", "version", "contract_hash", "precision", "instruction_set", "ivdr_version"}
        try:
            values = {key: value if key in texts else parse_json(value) for key, value in ours.items()}
            version = former.check_version(values.get("format_version"), where=where, error=ArtifactError)
            if version == 1:
                values = former.upgrade_onnx_metadata(values, where=where)
            metadata = from_dict(cls, values, where=where)
        except (ConfigError, ValueError) as error:
            raise ArtifactError(
                f"the metadata of {where} cannot be read ({reason_of(error)})", hint=hint
            ) from error
        if metadata.contract_hash != metadata.contract.contract_hash:
            raise ArtifactError(f"the contract in {where} is not the one of its hash", hint=hint)
        return metadata
