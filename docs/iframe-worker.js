// Search in pages that are opened from disk: browsers start no workers from files, so a hidden frame runs the script.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = Object.assign(document.createElement("iframe"), { hidden: true });
    document.body.append(frame);
    const inside = frame.contentWindow;
    this.inside = new Promise((resolve) => (frame.onload = () => resolve(inside)));
    addEventListener("message", ({ source, data }) => {
      if (source === inside) this.dispatchEvent(new MessageEvent("message", { data }));
    });
    inside.document.write(
      `<script>postMessage = (data) => parent.postMessage(data, "*")</script><script src="${url}"></script>`,
    );
    inside.document.close();
  }
  postMessage(data) {
    this.inside.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
  }
}
if (location.protocol === "file:") window.Worker = window.IFrameWorker = IFrameWorker;
