//! The incumbent's side: leave everything open, write down where it is, and become the new program.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use heirloom_sys::SignalMask;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use super::record::Record;
use crate::crash::{self, Point};
use crate::item::ItemId;
use crate::limits::Limits;
use crate::manifest::{Base, ManifestError, seal};
use crate::upgrade::{Launch, Role, environment};

/// The numbers below this are the standard streams'.
const FIRST_FREE: i32 = 3;

/// What travels beside the bundle.
pub(crate) struct Beside<'a> {
    pub(crate) lock: BorrowedFd<'a>,
    pub(crate) signal_mask: SignalMask,
    pub(crate) frozen_at_ns: u64,
    pub(crate) began_at_ns: u64,
}

/// Becomes the new program with these items. Returns only when that fails, with the reason; everything is as before then.
pub(crate) fn replace<'d>(
    launch: &Launch,
    base: Base,
    beside: &Beside<'_>,
    limits: &Limits,
    descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
) -> String {
    // Duplicates of descriptors that cannot stay as they are; close-on-exec closes the originals.
    let mut duplicates: Vec<OwnedFd> = Vec::new();
    let mut passed: Vec<(ItemId, BorrowedFd<'d>)> = Vec::with_capacity(base.items.len());
    for entry in &base.items {
        match descriptor(entry.id) {
            Some(fd) => passed.push((entry.id, fd)),
            None => return format!("the application lends no descriptor of item {entry}"),
        }
    }
    let mut taken = BTreeSet::from([beside.lock.as_raw_fd()]);
    let mut descriptors = Vec::with_capacity(passed.len());
    let mut open: Vec<BorrowedFd<'_>> = Vec::with_capacity(passed.len() + 2);
    for (id, fd) in passed {
        let number = fd.as_raw_fd();
        if number >= FIRST_FREE && taken.insert(number) {
            descriptors.push((id.0, number));
            open.push(fd);
            continue;
        }
        match fcntl_dupfd_cloexec(fd, FIRST_FREE) {
            Ok(duplicate) => {
                descriptors.push((id.0, duplicate.as_raw_fd()));
                taken.insert(duplicate.as_raw_fd());
                duplicates.push(duplicate);
            }
            Err(error) => return format!("cannot duplicate the descriptor of item {id}: {error}"),
        }
    }
    let record = Record {
        descriptors,
        lock: beside.lock.as_raw_fd(),
        signal_mask: beside.signal_mask.0,
        frozen_at_ns: beside.frozen_at_ns,
        began_at_ns: beside.began_at_ns,
    };
    let manifest = match write_manifest(base, &record, limits) {
        Ok(manifest) => manifest,
        Err(error) => return format!("cannot write the manifest: {error}"),
    };
    crash::reach(Point::ManifestSealed);
    let role = Role::InPlace { incumbent: std::process::id(), manifest: manifest.as_raw_fd() };
    let call = match Call::prepare(launch, role) {
        Ok(call) => call,
        Err(error) => return error,
    };
    open.extend(duplicates.iter().map(AsFd::as_fd));
    open.extend([beside.lock, manifest.as_fd()]);
    let error = match open.iter().try_for_each(|fd| fcntl_setfd(fd, FdFlags::empty())) {
        Ok(()) => {
            crash::reach(Point::LeftOpen);
            call.execute()
        }
        Err(error) => error.into(),
    };
    for fd in open {
        // It can be set as it could be cleared.
        let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
    }
    format!("cannot become {}: {error}", launch.program.display())
}

fn write_manifest(mut base: Base, record: &Record, limits: &Limits) -> Result<OwnedFd, ManifestError> {
    base.sections.push(record.to_section()?);
    Ok(seal("in-place", &base.encode(limits)?.bytes)?)
}

/// An execve(2) with everything in the form that it takes.
struct Call {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Call {
    fn prepare(launch: &Launch, role: Role) -> Result<Call, String> {
        let string = |bytes: &[u8]| {
            CString::new(bytes).map_err(|_| {
                format!(
                    "{:?} has a null byte in it, which no argument can have",
                    String::from_utf8_lossy(bytes)
                )
            })
        };
        let arguments = [&launch.name].into_iter().chain(&launch.arguments);
        Ok(Call {
            program: string(launch.program.as_os_str().as_bytes())?,
            arguments: arguments.map(|argument| string(argument.as_bytes())).collect::<Result<_, _>>()?,
            environment: environment(role)
                .map(|(name, value)| string(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
                .collect::<Result<_, _>>()?,
        })
    }

    fn execute(&self) -> io::Error {
        crash::reach(Point::BeforeExec);
        heirloom_sys::execve(&self.program, &self.arguments, &self.environment)
    }
}
