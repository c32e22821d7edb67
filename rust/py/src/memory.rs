//! Reading memory that another thread may free at any moment, without ever touching it ourselves.
//!
//! The kernel copies the bytes and answers with an error where nothing is mapped, so no address can end the process.
//! What is read may be anything that lies there by then: callers compare it, and follow no pointer in it.

use std::io::{Error, Result};

/// So many bytes are read at once: what a pipe holds.
pub const MOST_AT_ONCE: usize = 1 << 16;

/// A run of bytes: where it begins, and how long it is.
pub type Piece = (usize, usize);

/// Read pieces one after the other into `out`, which is as long as all of them together.
///
/// Returns false where some of it is not mapped; `out` then holds anything.
pub fn read(pieces: &[Piece], out: &mut [u8]) -> Result<bool> {
    debug_assert_eq!(pieces.iter().map(|(_, length)| length).sum::<usize>(), out.len());
    if pieces.is_empty() {
        return Ok(true);
    }
    system::read(pieces, out)
}

#[cfg(unix)]
mod system {
    use std::fs::File;
    use std::io::Read;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use libc::{c_int, c_void, iovec};

    use super::{Error, MOST_AT_ONCE, Piece, Result};

    /// The most pieces that one system call takes.
    const MOST_PIECES: usize = 1024;
    /// Pieces this long are cheaper to copy directly, where the system can; shorter ones through a pipe.
    #[cfg(target_os = "linux")]
    const LONG: usize = 1 << 13;

    pub fn read(pieces: &[Piece], out: &mut [u8]) -> Result<bool> {
        #[cfg(target_os = "linux")]
        if out.len() >= pieces.len() * LONG
            && let Some(found) = read_directly(pieces, out)?
        {
            return Ok(found);
        }
        read_through_pipe(pieces, out)
    }

    /// None where this system forbids the call.
    #[cfg(target_os = "linux")]
    fn read_directly(pieces: &[Piece], out: &mut [u8]) -> Result<Option<bool>> {
        // SAFETY: takes nothing and cannot fail.
        let process = unsafe { libc::getpid() };
        let mut rest = out;
        for pieces in pieces.chunks(MOST_PIECES) {
            let length: usize = pieces.iter().map(|(_, length)| length).sum();
            let (part, behind) = rest.split_at_mut(length);
            rest = behind;
            let remote: Vec<iovec> = pieces.iter().map(vector).collect();
            let local = iovec { iov_base: part.as_mut_ptr().cast(), iov_len: length };
            // SAFETY: the kernel writes at most `length` bytes to `part`. It checks every remote address itself.
            let read =
                unsafe { libc::process_vm_readv(process, &raw const local, 1, remote.as_ptr(), remote.len() as _, 0) };
            if read < 0 {
                let error = Error::last_os_error();
                return match error.raw_os_error() {
                    Some(libc::EFAULT) => Ok(Some(false)),
                    Some(libc::ENOSYS | libc::EPERM) => Ok(None),
                    _ => Err(error),
                };
            }
            if read.cast_unsigned() < length {
                return Ok(Some(false));
            }
        }
        Ok(Some(true))
    }

    /// Have the kernel write the pieces into a pipe of our own and read them back.
    fn read_through_pipe(pieces: &[Piece], out: &mut [u8]) -> Result<bool> {
        let (mut reader, writer) = pipe()?;
        let (mut next, mut skip, mut done) = (0, 0, 0);
        let mut vectors: Vec<iovec> = Vec::with_capacity(pieces.len().min(MOST_PIECES));
        while next < pieces.len() {
            vectors.clear();
            let mut room = MOST_AT_ONCE;
            for (index, (start, length)) in pieces[next..].iter().take(MOST_PIECES).enumerate() {
                let begun = if index == 0 { skip } else { 0 };
                let take = (length - begun).min(room);
                vectors.push(vector(&(start.wrapping_add(begun), take)));
                room -= take;
                if room == 0 {
                    break;
                }
            }
            // SAFETY: the vectors are ours, and the kernel checks every address in them.
            let written = unsafe { libc::writev(writer.as_raw_fd(), vectors.as_ptr(), vectors.len() as c_int) };
            if written < 0 {
                let error = Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    Some(libc::EFAULT) => return Ok(false),
                    _ => return Err(error),
                }
            }
            let mut written = written.cast_unsigned();
            reader.read_exact(&mut out[done..done + written])?;
            done += written;
            while next < pieces.len() && written >= pieces[next].1 - skip {
                written -= pieces[next].1 - skip;
                (next, skip) = (next + 1, 0);
            }
            skip += written;
        }
        Ok(true)
    }

    fn vector(piece: &Piece) -> iovec {
        iovec { iov_base: std::ptr::with_exposed_provenance_mut::<c_void>(piece.0), iov_len: piece.1 }
    }

    /// One a call: a pipe that was kept would be shared with a forked process. A write that finds no room returns.
    fn pipe() -> Result<(File, OwnedFd)> {
        let mut ends = MaybeUninit::<[c_int; 2]>::uninit();
        // SAFETY: the kernel writes two descriptors, or says that it did not.
        let failed = unsafe { libc::pipe(ends.as_mut_ptr().cast()) } != 0;
        if failed {
            return Err(Error::last_os_error());
        }
        // SAFETY: written by the call above, and ours.
        let ends = unsafe { ends.assume_init() };
        for end in ends {
            // SAFETY: the descriptors are open.
            unsafe {
                libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
        // SAFETY: as above; each is owned once.
        let (reader, writer) = unsafe { (File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
        // SAFETY: the descriptor is open.
        unsafe {
            let flags = libc::fcntl(writer.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
        Ok((reader, writer))
    }
}

#[cfg(windows)]
mod system {
    use std::ffi::c_void;

    use super::{Error, Piece, Result};

    const ERROR_PARTIAL_COPY: i32 = 299;
    const ERROR_NOACCESS: i32 = 998;

    #[link(name = "kernel32")]
    unsafe extern "system" {
        fn GetCurrentProcess() -> *mut c_void;
        fn ReadProcessMemory(
            process: *mut c_void,
            base: *const c_void,
            to: *mut c_void,
            size: usize,
            read: *mut usize,
        ) -> i32;
    }

    pub fn read(pieces: &[Piece], out: &mut [u8]) -> Result<bool> {
        let mut rest = out;
        for (start, length) in pieces {
            let (part, behind) = rest.split_at_mut(*length);
            rest = behind;
            let mut read = 0;
            // SAFETY: at most `length` bytes are written to `part`. The system checks the address that is read.
            let is_read = unsafe {
                let from = std::ptr::with_exposed_provenance(*start);
                ReadProcessMemory(GetCurrentProcess(), from, part.as_mut_ptr().cast(), *length, &raw mut read)
            } != 0;
            if !is_read {
                let error = Error::last_os_error();
                return match error.raw_os_error() {
                    Some(ERROR_PARTIAL_COPY | ERROR_NOACCESS) => Ok(false),
                    _ => Err(error),
                };
            }
        }
        Ok(true)
    }
}
