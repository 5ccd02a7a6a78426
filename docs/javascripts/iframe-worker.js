// Search in a site that is opened from a folder: browsers start no Worker for a file:// page, so the search runs in a
// hidden frame of the page instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = (this.inside = frame.contentWindow)
      this.waiting = []
      inside.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.ready = () => {
        const waiting = this.waiting
        this.waiting = null
        waiting.forEach((data) => this.postMessage(data))
      }
      inside.document.open()
      inside.document.write(
        "<script>" +
          "postMessage = answer;" + // the worker's answers go to the page
          // importScripts blocks in a worker; here each script is loaded after the one before
          "importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {" +
          "const script = document.createElement('script');" +
          "script.src = url; script.onload = done; script.onerror = failed;" +
          "document.body.appendChild(script) })), Promise.resolve())" +
          "</script><script src=\"" + new URL(url, document.baseURI) + "\" onload=\"ready()\"></script>"
      )
      inside.document.close()
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
