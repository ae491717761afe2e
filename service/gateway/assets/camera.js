// The camera of this device as a source of photos.
import { make } from "./shared.js";
import { fileOf } from "./samples.js";

const WIDTH = 640; // of the photos; models see less

/** Whether the browser can ask for a camera: not on plain HTTP from another machine. */
export const hasCamera = () => Boolean(navigator.mediaDevices?.getUserMedia);

/**
 * Show what the camera sees in an element. Throws if the user or the system refuses.
 * @returns {Promise<{ grab: () => Promise<File>, stop: () => void }>} `grab` takes a photo
 */
export async function openCamera(parent) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { width: WIDTH, facingMode: "environment" } });
  const video = make("video", "", null, { srcObject: stream, muted: true, playsInline: true, ariaLabel: "Camera" });
  parent.replaceChildren(video);
  await video.play();
  return {
    grab() {
      const scale = Math.min(1, WIDTH / video.videoWidth);
      const size = { width: Math.round(video.videoWidth * scale), height: Math.round(video.videoHeight * scale) };
      const canvas = Object.assign(document.createElement("canvas"), size);
      canvas.getContext("2d").drawImage(video, 0, 0, size.width, size.height);
      return fileOf(canvas, "camera.jpg");
    },
    stop() {
      for (const track of stream.getTracks()) track.stop();
    },
  };
}
