"""The fields of collections' bodies and queries."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from service.search.collection import MAX_HITS, MAX_ID

MAX_LISTED = 1000
MAX_SHOWN = 100


class CollectionParameters(BaseModel):
    """The body of `PUT /collections/{name}`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        None, max_length=200, description="A model that embeds images; the catalog's default."
    )


class FolderParameters(BaseModel):
    """A folder of the server, in the place of `images`."""

    model_config = ConfigDict(extra="forbid")

    folder: str = Field(max_length=MAX_ID, description="In one of VITRAIL_IMAGE_FOLDERS.")
    after: str | None = Field(
        None, max_length=MAX_ID, description="The path after which to go on: an answer's `next`."
    )
    thumbnails: bool = Field(True, description="Store a thumbnail of each of its images.")


class ListParameters(BaseModel):
    """The query of `GET /collections/{name}/images`."""

    model_config = ConfigDict(extra="forbid")

    after: str = Field("", max_length=MAX_ID, description="The id after which to go on.")
    limit: int = Field(MAX_LISTED, ge=1, le=MAX_LISTED, description="Most images.")


class DeletionParameters(BaseModel):
    """The body of `POST /collections/{name}/images/delete`."""

    model_config = ConfigDict(extra="forbid")

    ids: list[str] = Field(min_length=1, max_length=MAX_LISTED, description="Those to delete.")


class QueryParameters(BaseModel):
    """A search: one of `text`, `vector` and `image`, unless an image comes in another form."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, min_length=1, description="For models that embed texts, too.")
    vector: Annotated[list[float] | None, FailFast()] = Field(None, max_length=65536)
    image: dict[str, Any] | None = Field(None, description='`{"base64"}` or `{"url"}`.')
    k: int = Field(10, ge=1, le=MAX_HITS, description="Most hits.")
    filter: dict[str, Any] = Field({}, description="Values that the hits' metadata has.")
    thumbnails: bool = Field(
        False, description=f"Return the hits' thumbnails as base64; for a `k` up to {MAX_SHOWN}."
    )
