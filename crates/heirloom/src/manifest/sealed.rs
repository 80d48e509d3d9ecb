//! Sealed memfds: how a manifest travels.
//!
//! A memfd has no size limit worth speaking of, where a packet has, and once it is sealed nobody can change it:
//! the receiver checks the seals, and what it has checked stays as it was. The file offset belongs to everybody
//! who holds a duplicate, so that nothing here uses or moves it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create},
    io::{Errno, pread, pwrite},
};

use super::{ManifestError, within};
use crate::courtesy;

/// Bytes that are written or read in a step.
const AT_ONCE: usize = 64 * 1024;

/// After these nobody can change contents, size or seals. See `F_ADD_SEALS` in fcntl(2).
const SEALS: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE).union(SealFlags::SEAL);

/// Puts `bytes` in a new memfd, called `name` in `/proc`, and seals it.
///
/// The descriptor is close-on-exec, and the memory is not executable (kernels before 6.3 lack that flag and do
/// without).
///
/// # Errors
/// What memfd_create(2), pwrite(2) or fcntl(2) said: too many open files, no memory, a file size limit
/// (RLIMIT_FSIZE) …
///
/// ```
/// use heirloom::{Kind, manifest::{read_sealed, seal}};
///
/// let memfd = seal("greeting", b"hello")?;
/// assert_eq!(Kind::of(&memfd)?, Kind::Memfd);
/// assert_eq!(read_sealed(&memfd, 100).unwrap(), b"hello");
/// # Ok::<_, std::io::Error>(())
/// ```
pub fn seal(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(name, flags)?,
        created => created?,
    };
    let mut written = 0;
    while written < bytes.len() {
        let end = bytes.len().min(written + AT_ONCE);
        match pwrite(&memfd, &bytes[written..end], written as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => written += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if written < bytes.len() {
            courtesy::next_step();
        }
    }
    fcntl_add_seals(&memfd, SEALS)?;
    Ok(memfd)
}

/// Reads all of a sealed memfd, at most `limit` bytes.
///
/// # Errors
/// [`ManifestError::NotSealed`] unless it is a memfd that can no longer change, [`ManifestError::Limit`] when it
/// is larger than `limit`, [`ManifestError::Io`] otherwise. The offset, which is shared, is neither used nor moved.
pub fn read_sealed(memfd: impl AsFd, limit: usize) -> Result<Vec<u8>, ManifestError> {
    let memfd = memfd.as_fd();
    let seals = match fcntl_get_seals(memfd) {
        // fcntl(2): EINVAL when the file does not support sealing.
        Err(Errno::INVAL) => SealFlags::empty(),
        seals => seals.map_err(io::Error::from)?,
    };
    if !seals.contains(SEALS) {
        return Err(ManifestError::NotSealed { missing: names(SEALS - seals) });
    }

    let size = fstat(memfd).map_err(io::Error::from)?.st_size;
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    within(|| "the size of the manifest's memfd".into(), "manifest_bytes", size, limit)?;
    let mut bytes = Vec::with_capacity(size);
    let mut read = 0;
    while read < size {
        bytes.resize(size.min(read + AT_ONCE), 0);
        match pread(memfd, &mut bytes[read..], read as u64) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => read += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        if read < size {
            courtesy::next_step();
        }
    }
    Ok(bytes)
}

fn names(seals: SealFlags) -> String {
    let names = [
        (SealFlags::SHRINK, "shrink"),
        (SealFlags::GROW, "grow"),
        (SealFlags::WRITE, "write"),
        (SealFlags::SEAL, "seal"),
    ];
    let missing: Vec<&str> =
        names.iter().filter(|(seal, _)| seals.contains(*seal)).map(|(_, n)| *n).collect();
    missing.join(", ")
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Seek, SeekFrom, Write},
    };

    use super::*;

    #[test]
    fn contents_cannot_change_and_the_offset_does_not_matter() {
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let mut file = File::from(seal("test", &bytes).unwrap());
        assert!(rustix::io::fcntl_getfd(&file).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(file.stream_position().unwrap(), 0);

        file.seek(SeekFrom::Start(77_777)).unwrap();
        assert_eq!(read_sealed(&file, 100_000).unwrap(), bytes);
        assert_eq!(file.stream_position().unwrap(), 77_777);

        assert_eq!(file.write(b"x").unwrap_err().raw_os_error(), Some(Errno::PERM.raw_os_error()));
        assert!(file.set_len(1).is_err());
        assert!(file.set_len(200_000).is_err());
        assert_eq!(fcntl_add_seals(&file, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
    }

    #[test]
    fn nothing_is_something_too() {
        assert_eq!(read_sealed(seal("empty", b"").unwrap(), 0).unwrap(), b"");
    }

    #[test]
    fn larger_than_the_limit_is_refused() {
        let error = read_sealed(seal("large", &[0; 11]).unwrap(), 10).unwrap_err();
        assert!(matches!(error, ManifestError::Limit { found: 11, limit: 10, .. }), "{error}");
    }

    #[test]
    fn what_is_not_sealed_is_refused_and_says_what_lacks() {
        let missing = |fd: OwnedFd| match read_sealed(fd, 100) {
            Err(ManifestError::NotSealed { missing }) => missing,
            other => panic!("{other:?}"),
        };
        let unsealed = || memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert_eq!(missing(unsealed()), "shrink, grow, write, seal");

        let half = unsealed();
        fcntl_add_seals(&half, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE).unwrap();
        assert_eq!(missing(half), "write, seal");

        // A file and a pipe have no seals at all.
        assert_eq!(missing(tempfile::tempfile().unwrap().into()).matches(", ").count() + 1, 4);
        assert_eq!(missing(io::pipe().unwrap().0.into()), "shrink, grow, write, seal");
    }
}
