//! How many placeholders an image takes, and how large an image is: its header reports, no pixel is decoded.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use crate::tokenizer::ImageGeometry;

/// An image's size in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Columns of pixels.
    pub width: u32,
    /// Rows of pixels.
    pub height: u32,
}

/// Why an image cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The URL's scheme is not one that is resolved here.
    #[error("unsupported image URL scheme in '{0}'")]
    Scheme(String),
    /// A `data:` URL that is not `data:<mime>;base64,<payload>`.
    #[error("invalid data URL: expected the form data:<mime>;base64,<payload>")]
    DataUrl,
    /// The payload is not base64.
    #[error("invalid data URL: the payload is not valid base64")]
    Base64,
    /// The bytes are not an image of a supported format.
    #[error("the payload is not a readable image (supported: PNG, JPEG, WebP, GIF, BMP, TIFF)")]
    Format,
    /// Getting the image failed.
    #[error("the image cannot be read: {0}")]
    Unavailable(String),
}

/// Reports how large the images of a conversation are.
///
/// It is asked for every image, `data:` URLs included; [`data_url_size`] responds for those. Whoever
/// fetches images does so before and looks the sizes up here.
pub trait ImageSizes {
    /// The size of the image behind a URL.
    fn size(&self, url: &str) -> Result<ImageSize, ImageError>;
}

/// Images in `data:` URLs only.
#[derive(Clone, Copy, Debug, Default)]
pub struct DataUrls;

impl ImageSizes for DataUrls {
    fn size(&self, url: &str) -> Result<ImageSize, ImageError> {
        data_url_size(url)
    }
}

/// Standard base64 with padding; like Python's decoder it does not mind unused bits in the last character.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&alphabet::STANDARD, GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true));

/// The bytes of a `data:<mime>;base64,<payload>` URL. Characters outside the alphabet, line breaks mostly,
/// are passed over.
pub fn data_url_bytes(url: &str) -> Result<Vec<u8>, ImageError> {
    let rest = url.strip_prefix("data:").ok_or_else(|| ImageError::Scheme(scheme(url)))?;
    let (header, payload) = rest.split_once(',').ok_or(ImageError::DataUrl)?;
    if !header.ends_with(";base64") || payload.is_empty() {
        return Err(ImageError::DataUrl);
    }
    if let Ok(bytes) = BASE64.decode(payload) {
        return Ok(bytes);
    }
    let kept: Vec<u8> =
        payload.bytes().filter(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')).collect();
    BASE64.decode(kept).map_err(|_| ImageError::Base64)
}

/// What of a URL may be repeated in an error message: its scheme.
fn scheme(url: &str) -> String {
    url.split(':').next().unwrap_or_default().chars().take(32).collect()
}

/// The size of the image in a `data:` URL.
pub fn data_url_size(url: &str) -> Result<ImageSize, ImageError> {
    image_size(&data_url_bytes(url)?)
}

/// The size of an encoded image, from its header.
pub fn image_size(bytes: &[u8]) -> Result<ImageSize, ImageError> {
    use imagesize::ImageType;
    match imagesize::image_type(bytes) {
        Ok(ImageType::Png | ImageType::Jpeg | ImageType::Webp | ImageType::Gif | ImageType::Bmp | ImageType::Tiff) => {}
        _ => return Err(ImageError::Format),
    }
    let size = imagesize::blob_size(bytes).map_err(|_| ImageError::Format)?;
    match (u32::try_from(size.width), u32::try_from(size.height)) {
        (Ok(width @ 1..), Ok(height @ 1..)) => Ok(ImageSize { width, height }),
        _ => Err(ImageError::Format),
    }
}

/// Columns and rows of an image's placeholders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageGrid {
    /// Placeholders that carry features, in one row.
    pub columns: u32,
    /// Rows.
    pub rows: u32,
}

impl ImageGrid {
    /// The grid of an image: shrunk to the longest side allowed (each side rounded half to even), then
    /// covered with squares of patch size times merge size.
    pub fn of(size: ImageSize, geometry: ImageGeometry) -> Self {
        let longest = f64::from(geometry.max_image_size);
        let (width, height) = (f64::from(size.width), f64::from(size.height));
        let ratio = (height / longest).max(width / longest);
        let shrink = |side: u32| {
            if ratio > 1.0 { ((f64::from(side) / ratio).round_ties_even() as u32).max(1) } else { side }
        };
        let square = geometry.patch_size * geometry.spatial_merge_size;
        let squares = |side: u32| (side - 1) / square + 1;
        Self { columns: squares(shrink(size.width)), rows: squares(shrink(size.height)) }
    }

    /// Number of token IDs: a row of placeholders and its break, for each row.
    pub fn length(self) -> usize {
        (self.columns as usize + 1) * self.rows as usize
    }
}
