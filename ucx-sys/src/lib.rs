//! The calls of UCX's protocol layer (`libucp`) that Baton makes, written by hand and loaded when the first link wants them:
//! building needs no UCX, and where the library is missing `Ucp::load` says so. Layouts are those of API 1.13; UCX only
//! appends to its structures and reads what `field_mask` names, so newer libraries take them too.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// `ucs_status_t`. Negative: an error.
pub type Status = i8;
pub const OK: Status = 0;
pub const BUSY: Status = -15;

/// What this crate was written against.
pub const API: (c_uint, c_uint) = (1, 13);

/// Handles are pointers to what only the library knows.
pub type Handle = *mut c_void;

pub const PARAM_FEATURES: u64 = 1;
pub const FEATURE_WAKEUP: u64 = 1 << 4;
pub const FEATURE_STREAM: u64 = 1 << 5;

/// `ucp_params_t`.
#[repr(C)]
pub struct Params {
    pub field_mask: u64,
    pub features: u64,
    pub request_size: usize,
    pub request_init: *const c_void,
    pub request_cleanup: *const c_void,
    pub tag_sender_mask: u64,
    pub mt_workers_shared: c_int,
    pub estimated_num_eps: usize,
    pub estimated_num_ppn: usize,
    pub name: *const c_char,
}

pub const WORKER_PARAM_THREAD_MODE: u64 = 1;
pub const THREAD_MODE_SINGLE: c_int = 0;

/// `ucp_worker_params_t`.
#[repr(C)]
pub struct WorkerParams {
    pub field_mask: u64,
    pub thread_mode: c_int,
    pub cpu_mask: [u64; 16],
    pub events: c_uint,
    pub user_data: *mut c_void,
    pub event_fd: c_int,
    pub flags: u64,
    pub name: *const c_char,
    pub am_alignment: usize,
    pub client_id: u64,
}

/// `ucs_sock_addr_t`.
#[repr(C)]
pub struct SockAddr {
    pub address: *const libc::sockaddr,
    pub length: libc::socklen_t,
}

/// A callback and what it is called with.
#[repr(C)]
pub struct Handler {
    pub call: *const c_void,
    pub argument: *mut c_void,
}

pub const LISTENER_PARAM_SOCK_ADDR: u64 = 1;
pub const LISTENER_PARAM_CONN_HANDLER: u64 = 1 << 2;

/// `ucp_listener_params_t`. `conn_handler` calls a `Connecting`.
#[repr(C)]
pub struct ListenerParams {
    pub field_mask: u64,
    pub sockaddr: SockAddr,
    pub accept_handler: Handler,
    pub conn_handler: Handler,
}

pub const LISTENER_ATTR_SOCKADDR: u64 = 1;

/// `ucp_listener_attr_t`.
#[repr(C)]
pub struct ListenerAttr {
    pub field_mask: u64,
    pub sockaddr: libc::sockaddr_storage,
}

pub const EP_PARAM_ERR_HANDLING_MODE: u64 = 1 << 1;
pub const EP_PARAM_ERR_HANDLER: u64 = 1 << 2;
pub const EP_PARAM_FLAGS: u64 = 1 << 5;
pub const EP_PARAM_SOCK_ADDR: u64 = 1 << 4;
pub const EP_PARAM_CONN_REQUEST: u64 = 1 << 6;
pub const ERR_HANDLING_MODE_PEER: c_int = 1;
pub const EP_CLIENT_SERVER: c_uint = 1;

/// `ucp_ep_params_t`. `err_handler` calls a `Failed`.
#[repr(C)]
pub struct EpParams {
    pub field_mask: u64,
    pub address: *const c_void,
    pub err_mode: c_int,
    pub err_handler: Handler,
    pub user_data: *mut c_void,
    pub flags: c_uint,
    pub sockaddr: SockAddr,
    pub conn_request: Handle,
    pub name: *const c_char,
    pub local_sockaddr: SockAddr,
}

pub const OP_CALLBACK: u32 = 1 << 1;
pub const OP_USER_DATA: u32 = 1 << 2;
pub const OP_FLAGS: u32 = 1 << 4;
pub const EP_CLOSE_FORCE: u32 = 1;

/// `ucp_request_param_t`. `callback` is a `Sent` or a `Received`.
#[repr(C)]
pub struct RequestParam {
    pub op_attr_mask: u32,
    pub flags: u32,
    pub request: *mut c_void,
    pub callback: *const c_void,
    pub datatype: u64,
    pub user_data: *mut c_void,
    pub reply_buffer: *mut c_void,
    pub memory_type: c_int,
    pub recv_info: *mut c_void,
    pub memh: Handle,
}

/// `ucp_listener_conn_callback_t`: (connection request, argument).
pub type Connecting = unsafe extern "C" fn(Handle, *mut c_void);
/// `ucp_err_handler_cb_t`: (argument, endpoint, status).
pub type Failed = unsafe extern "C" fn(*mut c_void, Handle, Status);
/// `ucp_send_nbx_callback_t`: (request, status, user data).
pub type Sent = unsafe extern "C" fn(*mut c_void, Status, *mut c_void);
/// `ucp_stream_recv_nbx_callback_t`: (request, status, length, user data).
pub type Received = unsafe extern "C" fn(*mut c_void, Status, usize, *mut c_void);

/// What a call that may take its time returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    Done,
    /// Its callback tells.
    Pending,
    /// No callback comes.
    Failed(Status),
}

impl Begun {
    /// Out of an `ucs_status_ptr_t`: null, a small negative number, or a request.
    pub fn of(pointer: *mut c_void) -> Begun {
        match pointer as isize {
            0 => Begun::Done,
            status @ -100..0 => Begun::Failed(status as Status),
            _ => Begun::Pending,
        }
    }
}

macro_rules! calls {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)?, $symbol:literal;)*) => {
        /// The library's calls.
        pub struct Ucp {
            $(pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            status_string: unsafe extern "C" fn(Status) -> *const c_char,
        }

        impl Ucp {
            /// # Safety
            /// `library` is a handle of a loaded `libucp`, `base` one of `libucs`.
            unsafe fn find(library: *mut c_void, base: *mut c_void) -> Result<Ucp, String> {
                // SAFETY: the symbols are functions with these signatures in every release since API 1.13.
                unsafe {
                    Ok(Ucp {
                        $($name: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(
                            symbol(library, $symbol)?,
                        ),)*
                        status_string: std::mem::transmute::<
                            *mut c_void,
                            unsafe extern "C" fn(Status) -> *const c_char,
                        >(symbol(base, c"ucs_status_string")?),
                    })
                }
            }
        }
    };
}

calls! {
    version: fn() -> *const c_char, c"ucp_get_version_string";
    get_version: fn(*mut c_uint, *mut c_uint, *mut c_uint), c"ucp_get_version";
    config_read: fn(*const c_char, *const c_char, *mut Handle) -> Status, c"ucp_config_read";
    config_release: fn(Handle), c"ucp_config_release";
    init: fn(c_uint, c_uint, *const Params, Handle, *mut Handle) -> Status, c"ucp_init_version";
    cleanup: fn(Handle), c"ucp_cleanup";
    worker_create: fn(Handle, *const WorkerParams, *mut Handle) -> Status, c"ucp_worker_create";
    worker_get_efd: fn(Handle, *mut c_int) -> Status, c"ucp_worker_get_efd";
    worker_arm: fn(Handle) -> Status, c"ucp_worker_arm";
    worker_progress: fn(Handle) -> c_uint, c"ucp_worker_progress";
    listener_create: fn(Handle, *const ListenerParams, *mut Handle) -> Status, c"ucp_listener_create";
    listener_query: fn(Handle, *mut ListenerAttr) -> Status, c"ucp_listener_query";
    listener_reject: fn(Handle, Handle) -> Status, c"ucp_listener_reject";
    listener_destroy: fn(Handle), c"ucp_listener_destroy";
    ep_create: fn(Handle, *const EpParams, *mut Handle) -> Status, c"ucp_ep_create";
    ep_print_info: fn(Handle, *mut c_void), c"ucp_ep_print_info";
    ep_close: fn(Handle, *const RequestParam) -> *mut c_void, c"ucp_ep_close_nbx";
    stream_send: fn(Handle, *const c_void, usize, *const RequestParam) -> *mut c_void, c"ucp_stream_send_nbx";
    stream_recv: fn(Handle, *mut c_void, usize, *mut usize, *const RequestParam) -> *mut c_void, c"ucp_stream_recv_nbx";
    request_free: fn(*mut c_void), c"ucp_request_free";
}

unsafe fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: an open library and a C string.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(format!("libucp has no {}", name.to_string_lossy())) } else { Ok(found) }
}

impl Ucp {
    /// The system's library, loaded once for the life of the process; or why there is none.
    pub fn load() -> Result<&'static Ucp, &'static str> {
        static LOADED: OnceLock<Result<Ucp, String>> = OnceLock::new();
        LOADED.get_or_init(Ucp::open).as_ref().map_err(String::as_str)
    }

    fn open() -> Result<Ucp, String> {
        let open = |name: &CStr| {
            // SAFETY: C strings; the library's initializers are UCX's own.
            unsafe {
                let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
                if !library.is_null() {
                    return Ok(library);
                }
                let why = libc::dlerror();
                let why = if why.is_null() { "no reason given".into() } else { CStr::from_ptr(why).to_string_lossy() };
                Err(why.into_owned())
            }
        };
        let (base, library) = (open(c"libucs.so.0")?, open(c"libucp.so.0")?);
        // SAFETY: both have just been opened, and are never closed.
        let ucp = unsafe { Ucp::find(library, base)? };
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: three places to write to.
        unsafe { (ucp.get_version)(&mut major, &mut minor, &mut release) };
        if major != API.0 || minor < API.1 {
            return Err(format!("UCX {major}.{minor}.{release} is there; {}.{} or newer is needed", API.0, API.1));
        }
        Ok(ucp)
    }

    pub fn version(&self) -> String {
        // SAFETY: a constant string of the library.
        unsafe { CStr::from_ptr((self.version)()).to_string_lossy().into_owned() }
    }

    /// The library's words for a status.
    pub fn describe(&self, status: Status) -> String {
        // SAFETY: a constant string of the library, for any number.
        unsafe { CStr::from_ptr((self.status_string)(status)).to_string_lossy().into_owned() }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// Sizes and places as a C compiler finds them in the headers of 1.13.1.
    #[test]
    fn layouts_are_the_librarys() {
        assert_eq!((size_of::<Params>(), size_of::<WorkerParams>()), (80, 200));
        assert_eq!((size_of::<ListenerParams>(), size_of::<ListenerAttr>()), (56, 136));
        assert_eq!((size_of::<EpParams>(), size_of::<RequestParam>()), (104, 72));
        assert_eq!([offset_of!(ListenerParams, sockaddr), offset_of!(ListenerParams, conn_handler)], [8, 40]);
        let ep = [
            offset_of!(EpParams, err_mode),
            offset_of!(EpParams, err_handler),
            offset_of!(EpParams, flags),
            offset_of!(EpParams, sockaddr),
            offset_of!(EpParams, conn_request),
        ];
        assert_eq!(ep, [16, 24, 48, 56, 72]);
        let request = [offset_of!(RequestParam, callback), offset_of!(RequestParam, user_data)];
        assert_eq!(request, [16, 32]);
        assert_eq!(offset_of!(RequestParam, memh), 64);
    }

    #[test]
    fn pointers_that_are_statuses() {
        assert_eq!(Begun::of(std::ptr::null_mut()), Begun::Done);
        assert_eq!(Begun::of(-15isize as *mut c_void), Begun::Failed(BUSY));
        assert_eq!(Begun::of(0x1000 as *mut c_void), Begun::Pending);
    }
}
